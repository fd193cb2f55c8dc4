"""KgCoOp: CoOp whose text features stay close to those of hand-crafted prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from fastprompt.backbone import Backbone
from fastprompt.learners.base import Scores, check_weight
from fastprompt.learners.conditional import META_NET
from fastprompt.learners.coop import CoOp
from fastprompt.learners.recipe import Recipe
from fastprompt.learners.templates import DEFAULT_TEMPLATE, TEMPLATES

# Its table is CoOp's, but for textures.
SENTENCES = TEMPLATES | {"dtd": "a photo of a {}, a type of texture."}
PUBLISHED = {"source": "KgCoOp's code, trainers/kgcoop.py and its scripts", "epochs": 100, "batch_size": 128}


class KgCoOp(CoOp):
    """KgCoOp: CoOp held close to hand-crafted prompts, so that it forgets less of other classes (arXiv 2303.13283).

        loss = cross-entropy + weight * (1 - mean over classes of cos(t_c, h_c))

    with t_c the text feature behind the learned context and h_c that of the template. This follows the published code.

    Args:
        backbone: the frozen model.
        class_names: C names.
        context: words to start from, or a number of tokens with random start.
        template: hand-crafted sentence with one {} for the class name.
        weight: of the distance to the template; 0 is CoOp.
    """

    method: ClassVar[str] = "kgcoop"
    # Stored beside the context, and never used.
    foreign_names: ClassVar[Mapping[str, str | None]] = {
        "ctx": "context", "bias_vectors": None, **dict.fromkeys(META_NET)
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "default": Recipe(**PUBLISHED),
        **{dataset: Recipe(**PUBLISHED, options={"template": text}) for dataset, text in SENTENCES.items()},
    }

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        *,
        context: int | str = "a photo of a",
        template: str = DEFAULT_TEMPLATE,
        weight: float = 8.0,
    ) -> None:
        check_weight("weight", weight)
        super().__init__(backbone, class_names, context=context)
        self.template, self.weight = template, weight
        self.hand_crafted(template)  # a bad template is refused here, not in the first step

    def loss(self, scores: Scores, labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Cross-entropy and the distance to the template, a scalar."""
        cosines = (scores.parts["text"] * self.hand_crafted(self.template)).sum(dim=-1)  # (C,)
        return super().loss(scores, labels, generator=generator) + self.weight * (1 - cosines.mean())

"""CoOp: a learned context in place of the words around a class name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastprompt.backbone import Backbone, ImageFeatures
from fastprompt.backbone.class_tokens import check_class_names
from fastprompt.errors import InputError
from fastprompt.learners.base import Scores, check_axes
from fastprompt.learners.recipe import Recipe
from fastprompt.learners.text import TextLearner, initial_context
from fastprompt.sources import POOLED

EPOCHS = {1: 50, 2: 100, 4: 100, 8: 200, 16: 200}
POSITIONS = ("end", "middle", "front")


class CoOp(TextLearner):
    """CoOp: one learned context for all classes, or one for each (arXiv 2109.01134).

    The prompt of class c is "<context> <name c>.", and its logit the scaled cosine s * <z, t_c> of pooled image feature
    and text feature. This follows the published code.

    Args:
        backbone: the frozen model.
        class_names: C names.
        context: words to start from, or a number of tokens M with random start (16 in the paper's few-shot runs).
        position: where the class name stands: behind the context (end), after its first half (middle), or before it
            (front).
        class_specific: learn a context for each class. Such a run knows no other classes.
    """

    method: ClassVar[str] = "coop"
    reads: ClassVar[frozenset[str]] = POOLED
    contexts_named: ClassVar[tuple[str, ...]] = ("context",)
    foreign_names: ClassVar[Mapping[str, str | None]] = {"ctx": "context"}
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "default": Recipe(source="CoOp's code, vit_b16_ctxv1 (base-to-new)", epochs=EPOCHS),
        "imagenet": Recipe(source="CoOp's code, vit_b16_ctxv1 (base-to-new)", epochs=50),
        "few-shot": Recipe(
            source="CoOp's code, COOP.md (50 epochs on ImageNet)", epochs=EPOCHS, options={"context": 16}
        ),
    }

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        *,
        context: int | str = "a photo of a",
        position: Literal["end", "middle", "front"] = "end",
        class_specific: bool = False,
    ) -> None:
        if position not in POSITIONS:
            raise InputError(f"position: expected one of {', '.join(POSITIONS)}, got {position!r}")
        contexts = len(check_class_names(class_names)) if class_specific else 1
        starts = torch.stack([initial_context(backbone, context) for _ in range(contexts)])
        super().__init__(backbone, class_names, context_tokens=starts.shape[1], suffix=".")
        self.position, self.class_specific = position, class_specific
        self.context = nn.Parameter(starts if class_specific else starts[0])  # (C, M, W) or (M, W)

    @classmethod
    def read_foreign(cls, state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Learner``; where the name stood, a checkpoint does not say."""
        context = check_axes(state, "ctx", 2, 3)
        options = {"context": context.shape[-2], "class_specific": context.dim() == 3}
        return {name: options[name] for name in options if name in cls.option_parameters()}  # for KgCoOp, too

    def encode_text(self) -> Tensor:
        """See ``TextLearner``; G = 1."""
        tokens = self.context.shape[-2]
        before = {"end": tokens, "middle": tokens // 2, "front": 0}[self.position]
        in_front, behind = self.context[None].tensor_split([before], dim=-2)
        return self.backbone.encode_prompts(in_front, self.class_tokens, behind)

    def forward(self, features: ImageFeatures) -> Scores:
        """Scores of B images: scaled cosines of the pooled feature; part "text" (C, D)."""
        text = self.text_features()[0]
        features = self.backbone.accept(features)
        return Scores(self.backbone.logit_scale * features.pooled @ text.T, {"text": text})

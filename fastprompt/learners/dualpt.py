"""DuAl-PT: prompts that are aligned with the patches of an image and with what a language model says of a class."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt.backbone import Backbone, ImageFeatures
from fastprompt.learners.base import Scores, check_weight
from fastprompt.learners.coop import EPOCHS
from fastprompt.learners.descriptions import encode_descriptions, load_descriptions
from fastprompt.learners.loss import class_cross_entropy
from fastprompt.learners.recipe import Recipe
from fastprompt.learners.templates import DEFAULT_TEMPLATE
from fastprompt.learners.text import TextLearner, initial_contexts
from fastprompt.learners.transport import Transport, transport_similarity
from fastprompt.sources import FeatureSource

OURS = "PLOT's values (see there): those of DuAl-PT were not available to us"

logger = logging.getLogger(__name__)


class DuAlPT(TextLearner):
    """DuAl-PT: prompts aligned with patches by transport, and with a language model's words (arXiv 2309.04158).

    Our reading of the paper's abstract; its equations were not available to us. N contexts are shared by all classes.
    t[c] is the mean of the N prompts of class c, normalised, and e[c] that of the class's descriptions, encoded once by
    the frozen text tower.

        logits[b, c] = s * (<pooled[b], t[c]> + transport[b, c]) / 2        with the transport of PLOT
        loss = CE(logits) + weight * (mean over c of 1 - <t[c], e[c]>  +  CE over c' of s * <t[c], e[c']>, target c)

    Args:
        backbone: the frozen model.
        class_names: C names; the prompt is "<context> <name>.".
        descriptions: JSON file {class name: [sentences]}, read when training starts. Without one, "a photo of a
            <name>." is all that is said of a class.
        prompts: N, contexts to learn.
        context: words to start from, or a number of tokens with random start.
        weight: of the alignment with descriptions in the loss; at 0 they are not read.
    """

    method: ClassVar[str] = "dualpt"
    independent_images: ClassVar[bool] = False
    contexts_named: ClassVar[tuple[str, ...]] = ("contexts",)
    files: ClassVar[tuple[str, ...]] = ("descriptions",)
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "default": Recipe(source=OURS, epochs=EPOCHS, batch_size=128),
        "imagenet": Recipe(source=OURS, epochs=50, batch_size=128),
    }

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        *,
        descriptions: str | None = None,
        prompts: int = 4,
        context: int | str = 16,
        weight: float = 1.0,
    ) -> None:
        check_weight("weight", weight)
        starts = initial_contexts(backbone, context, prompts)
        super().__init__(backbone, class_names, context_tokens=starts.shape[1], suffix=".")
        self.descriptions, self.weight, self.transport = descriptions, weight, Transport()
        self.contexts = nn.Parameter(starts)  # (N, M, W)

    def encode_text(self) -> Tensor:
        """See ``TextLearner``; G = N."""
        return self.backbone.encode_prompts(self.contexts, self.class_tokens)

    def check(self) -> None:
        """Read the descriptions, so that an absent class is not found out in the first step."""
        if self.weight:
            self.described()

    def prepare(self, source: FeatureSource) -> None:
        """Say so where nothing was given to align with."""
        self.check()
        if self.weight and self.descriptions is None:
            logger.warning("dualpt was given no descriptions: it aligns with %r alone", DEFAULT_TEMPLATE)

    def described(self) -> Tensor:
        """The classes as they are described, (C, D), L2-normalised; encoded once.

        Raises:
            InputError: the file is not there, holds something else, or has no entry for a class.
        """
        if self.descriptions is None:
            return self.hand_crafted(DEFAULT_TEMPLATE)
        return self._frozen_text(self.descriptions, self._encode_descriptions)

    def _encode_descriptions(self) -> Tensor:
        return encode_descriptions(self.backbone, load_descriptions(self.descriptions, self.class_names))

    def forward(self, features: ImageFeatures) -> Scores:
        """Scores of B images; part "text" (C, D) is the mean prompt of every class."""
        features, text = self.backbone.accept(features), self.text_features()
        mean = F.normalize(text.mean(dim=0), dim=-1)
        transported = transport_similarity(self.local_features(features), text, self.transport)
        return Scores(self.backbone.logit_scale * (features.pooled @ mean.T + transported) / 2, {"text": mean})

    def loss(self, scores: Scores, labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Cross-entropy of the logits with labels (B,), and the weighted alignment with the descriptions."""
        loss = super().loss(scores, labels, generator=generator)
        if not self.weight:
            return loss
        cosines = scores.parts["text"] @ self.described().T  # (C, C)
        classes = torch.arange(len(cosines), device=cosines.device)
        aligned = (1 - cosines.diagonal()).mean() + class_cross_entropy(self.backbone.logit_scale * cosines, classes)
        return loss + self.weight * aligned

"""LoCoOp: CoOp that learns from background patches what belongs to no class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from fastprompt_kernels import patch_statistics
from torch import Tensor

from fastprompt.backbone import Backbone, ImageFeatures
from fastprompt.errors import InputError
from fastprompt.learners.base import Scores, check_weight
from fastprompt.learners.coop import CoOp
from fastprompt.learners.recipe import Recipe
from fastprompt.sources import PATCHES


class LoCoOp(CoOp):
    """LoCoOp: CoOp with background patches as examples of no class, for OOD detection (arXiv 2306.01293).

    A patch is background where its image's class is not among its K best classes.

        loss = cross-entropy - weight * mean entropy of the background patches' class probabilities

    Predictions are CoOp's. This follows the published code, with log(p) in the entropy where that has log(p + 1e-5).
    K and weight were chosen for ImageNet; K is a share of the classes here, so that it has a meaning for other data.

    Args:
        backbone: the frozen model.
        class_names: C names.
        context: words to start from, or a number of tokens with random start (16 in the paper).
        top_share: K / C, the share of the classes among which the true one must not be (published: 200 of 1000).
        weight: of the entropy; 0 is CoOp.
    """

    method: ClassVar[str] = "locoop"
    reads: ClassVar[frozenset[str]] = PATCHES
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "default": Recipe(source="LoCoOp's code, trainers/locoop.py (ImageNet)", epochs=50, options={"context": 16})
    }

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        *,
        context: int | str = "a photo of a",
        top_share: float = 0.2,
        weight: float = 0.25,
    ) -> None:
        check_weight("weight", weight)
        if not 0 < top_share < 1:
            raise InputError(f"top_share: expected a share between 0 and 1, got {top_share}")
        super().__init__(backbone, class_names, context=context)
        self.top_share, self.weight = top_share, weight

    def forward(self, features: ImageFeatures) -> Scores:
        """Scores of B images: CoOp's, with parts "text" (C, D), "pooled" (B, D) and "patches" (B, P, W)."""
        scores = super().forward(features)
        return Scores(scores.logits, {**scores.parts, "pooled": features.pooled, "patches": features.patches})

    def loss(self, scores: Scores, labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Cross-entropy minus the weighted entropy of the background, a scalar."""
        text, labels = scores.parts["text"], labels.to(scores.logits.device)
        patches = self.local_features(ImageFeatures(scores.parts["pooled"], scores.parts["patches"]))
        statistics = patch_statistics(patches, text, scale=self.backbone.logit_scale, labels=labels)
        background = statistics.rank >= max(1, round(self.top_share * len(text)))  # (B, P)
        entropy = (statistics.entropy * background).sum() / background.sum().clamp(min=1)
        return super().loss(scores, labels, generator=generator) - self.weight * entropy

"""DualView: learned and hand-crafted prompts as two views of the same classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.backbone import Backbone, ImageFeatures
from fastprompt.errors import InputError
from fastprompt.learners.base import Scores, check_weight
from fastprompt.learners.coop import EPOCHS, CoOp
from fastprompt.learners.loss import class_cross_entropy
from fastprompt.learners.recipe import Recipe
from fastprompt.learners.templates import DEFAULT_TEMPLATE, TEMPLATES
from fastprompt.sources import FeatureSource

OURS = {"source": "ours: CoOp's schedule, because the paper's numbers were not available to us", "epochs": EPOCHS}
TEMPERATURE = 0.07  # of the mutual information
LARGEST_MIX = 0.5  # share of the class mean in a mixed feature, at most


class DualView(CoOp):
    """DualView: learned and hand-crafted prompts bound by their mutual information (arXiv 2410.03189).

    This is our reading of the paper's abstract; its equations were not available to us. With t and h the text features
    (C, D) of the learned context and of the templates,

        loss = cross-entropy of s * <z, t> + weight * (CE(t h^T / 0.07) + CE(h t^T / 0.07)) / 2

    where class c is the target of row c. While training, an image's feature z becomes normalise((1 - a) z + a mu_y)
    with probability ``mixing``, mu_y the mean feature of its class and a uniform from 0 to 0.5. The prediction uses
    normalise(t + h).

    Args:
        backbone: the frozen model.
        class_names: C names.
        context: words to start from, or a number of tokens with random start.
        templates: hand-crafted sentences with one {} each; of several, the mean counts.
        weight: of the mutual information.
        mixing: share of the training images that are mixed with the mean of their class. With 0 and weight 0, the loss
            is CoOp's.
    """

    method: ClassVar[str] = "dual-view"
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "default": Recipe(**OURS),
        **{dataset: Recipe(**OURS, options={"templates": [text]}) for dataset, text in TEMPLATES.items()},
    }

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        *,
        context: int | str = "a photo of a",
        templates: Sequence[str] = (DEFAULT_TEMPLATE,),
        weight: float = 1.0,
        mixing: float = 0.5,
    ) -> None:
        check_weight("weight", weight)
        if not 0 <= mixing <= 1:
            raise InputError(f"mixing: expected a share between 0 and 1, got {mixing}")
        super().__init__(backbone, class_names, context=context)
        self.templates, self.weight, self.mixing = tuple(templates), weight, mixing
        self.hand_crafted(*self.templates)  # a bad template is refused here, not in the first step

    def _set_classes(self, class_names: Sequence[str]) -> None:
        super()._set_classes(class_names)
        self.class_means: Tensor | None = None

    def prepare(self, source: FeatureSource) -> None:
        """Take the mean pooled feature of every class, (C, D); that of a class without an image is 0."""
        sums = torch.zeros(len(self.class_names), self.backbone.embed_dim, device=self.backbone.device)
        counts = torch.zeros(len(self.class_names), 1, device=self.backbone.device)
        for features, labels in source.plain_batches(self.reads):
            member = F.one_hot(labels.to(sums.device), len(sums)).T.to(sums)  # (C, b); a product, to sum in one order
            sums += member @ features.pooled.to(sums)
            counts += member.sum(dim=1, keepdim=True)
        self.class_means = sums / counts.clamp(min=1)

    def both_views(self, text: Tensor) -> Tensor:
        """The class vectors that predict, (C, D), of text features of the learned context (C, D)."""
        return F.normalize(text + self.hand_crafted(*self.templates), dim=-1)

    def mean_text(self, features: ImageFeatures | None = None) -> tuple[Tensor, Tensor]:
        """See ``PromptLearner``; both are the mean of the two views."""
        both = self.both_views(self.text_features()[0])
        return both, both

    def forward(self, features: ImageFeatures) -> Scores:
        """Scores of B images: scaled cosines with both views; parts "text" (C, D) and "pooled" (B, D)."""
        text, pooled = self.text_features()[0], self.backbone.accept(features).pooled
        return Scores(self.backbone.logit_scale * pooled @ self.both_views(text).T, {"text": text, "pooled": pooled})

    def draw_mix(self, images: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the share of the class mean in each image's feature, (images,); 0 for those that stay as they are."""
        mixed, drawn = (torch.rand(images, device=self.backbone.device, generator=generator) for _ in range(2))
        return LARGEST_MIX * mixed * (drawn < self.mixing)

    def loss(self, scores: Scores, labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """See ``Learner``: cross-entropy of the learned view and mutual information of both, a scalar.

        Raises:
            InputError: images are to be mixed, and ``prepare`` was not called.
        """
        if self.class_means is None and self.mixing:
            raise InputError("class_means: expected a call of prepare(source) before training with mixed images")
        text, pooled = scores.parts["text"], scores.parts["pooled"]
        labels = labels.to(pooled.device)
        if self.mixing:
            mix = self.draw_mix(len(labels), generator)[:, None].to(pooled)
            pooled = F.normalize((1 - mix) * pooled + mix * self.class_means[labels].to(pooled), dim=-1)
        views = text @ self.hand_crafted(*self.templates).T / TEMPERATURE  # (C, C)
        classes = torch.arange(len(views), device=views.device)
        information = (class_cross_entropy(views, classes) + class_cross_entropy(views.T, classes)) / 2
        return class_cross_entropy(self.backbone.logit_scale * pooled @ text.T, labels) + self.weight * information

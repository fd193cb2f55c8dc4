"""What CoCoOp and CoPL share: every image has a context of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastprompt.backbone import Backbone, ImageFeatures
from fastprompt.learners.base import Scores
from fastprompt.learners.text import PromptLearner, initial_context

META_NET = tuple(f"meta_net.linear{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias"))


class ImageConditional(PromptLearner):
    """A learner whose context depends on the image: B images are B groups of contexts, encoded in one pass.

    A subclass gives ``contexts``.

    Attributes:
        context: (M, W), what the contexts of all images have in common.
        meta_net: D -> D // 16 -> W with a ReLU between; its layers are named as in CoCoOp's published code.
    """

    fixed_text: ClassVar[bool] = False
    contexts_named: ClassVar[tuple[str, ...]] = ("context",)

    def __init__(self, backbone: Backbone, class_names: Sequence[str], *, context: int | str = "a photo of a") -> None:
        start = initial_context(backbone, context)
        super().__init__(backbone, class_names, context_tokens=len(start), suffix=".")
        self.context = nn.Parameter(start)
        hidden = backbone.embed_dim // 16
        layers = {
            "linear1": nn.Linear(backbone.embed_dim, hidden),
            "relu": nn.ReLU(),
            "linear2": nn.Linear(hidden, backbone.text_width),
        }
        self.meta_net = nn.Sequential(OrderedDict(layers)).to(backbone.device)

    @abstractmethod
    def contexts(self, features: ImageFeatures) -> Tensor:
        """Contexts (B, M, W) of B images whose features are on the backbone's device."""

    def encode_text(self, features: ImageFeatures) -> Tensor:
        """Text features (B, C, D) of every class for every image, L2-normalised."""
        return self.backbone.encode_prompts(self.contexts(features), self.class_tokens)

    def mean_text(self, features: ImageFeatures) -> tuple[Tensor, Tensor]:
        """See ``PromptLearner``: each (B, C, D)."""
        text = self.encode_text(features)
        return text, text

    def forward(self, features: ImageFeatures) -> Scores:
        """Scores of B images: scaled cosines of the pooled feature with the image's own text features."""
        features = self.backbone.accept(features)
        text = self.encode_text(features)
        return Scores(self.backbone.logit_scale * torch.einsum("bd,bcd->bc", features.pooled, text))

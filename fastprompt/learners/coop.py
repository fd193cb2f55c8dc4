"""CoOp: one learned context for all classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from fastprompt.backbone import Backbone, ImageFeatures
from fastprompt.learners.base import Learner, Scores, initial_context
from fastprompt.learners.recipe import Recipe

EPOCHS = {1: 50, 2: 100, 4: 100, 8: 200, 16: 200}


class CoOp(Learner):
    """CoOp: one learned context for all classes, with the class name at the end (arXiv 2109.01134).

    Args:
        backbone: the frozen model.
        class_names: C names; the prompt is "<context> <name>.".
        context: words to start from, or a number of tokens with random start (16 in the paper's few-shot runs).
    """

    method: ClassVar[str] = "coop"
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "default": Recipe(source="CoOp's code, vit_b16_ctxv1 (base-to-new)", epochs=EPOCHS),
        "imagenet": Recipe(source="CoOp's code, vit_b16_ctxv1 (base-to-new)", epochs=50),
        "few-shot": Recipe(source="CoOp's code, COOP.md", epochs=EPOCHS, options={"context": 16}),
    }

    def __init__(self, backbone: Backbone, class_names: Sequence[str], *, context: int | str = "a photo of a") -> None:
        start = initial_context(backbone, context)
        super().__init__(backbone, class_names, context_tokens=len(start), suffix=".", options={"context": context})
        self.context = nn.Parameter(start)  # (M, W)

    def encode_text(self) -> Tensor:
        """See ``Learner``; G = 1."""
        return self.backbone.encode_prompts(self.context[None], self.class_tokens)

    def forward(self, features: ImageFeatures) -> Scores:
        """Scores of B images: scaled cosines of the pooled feature."""
        features = features.to(self.backbone.device)
        return Scores(self.backbone.logit_scale * features.pooled @ self.text_features()[0].T)

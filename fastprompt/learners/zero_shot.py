"""Zero-shot CLIP: a sentence per class, nothing learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from fastprompt.backbone import Backbone, ImageFeatures
from fastprompt.learners.base import Scores
from fastprompt.learners.holder import check_backbone
from fastprompt.learners.recipe import Recipe
from fastprompt.learners.templates import DEFAULT_TEMPLATE, TEMPLATES, split_template
from fastprompt.learners.text import TextLearner
from fastprompt.sources import POOLED

CODE = "CoOp's code, trainers/zsclip.py"
GL_MCM = "GL-MCM's code: CLIP's sentence without the full stop, with which OOD scores differ by 2e-3 to 3e-3"


class ZeroShot(TextLearner):
    """Zero-shot CLIP: a sentence for each class, nothing learned (arXiv 2103.00020).

    Args:
        backbone: the frozen model.
        class_names: C names.
        template: a sentence with one "{}" where the class name stands.
    """

    method: ClassVar[str] = "zero-shot"
    learns: ClassVar[bool] = False
    reads: ClassVar[frozenset[str]] = POOLED
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "default": Recipe(source=CODE),
        "gl-mcm": Recipe(source=GL_MCM, options={"template": "a photo of a {}"}),
        **{dataset: Recipe(source=CODE, options={"template": text}) for dataset, text in TEMPLATES.items()},
    }

    def __init__(self, backbone: Backbone, class_names: Sequence[str], *, template: str = DEFAULT_TEMPLATE) -> None:
        check_backbone(backbone)
        before, after = split_template(template)
        words = backbone.embed_words(before)[None]  # (1, M, W)
        super().__init__(backbone, class_names, context_tokens=words.shape[1], suffix=after)
        self._words = words

    def encode_text(self) -> Tensor:
        """See ``TextLearner``; G = 1."""
        return self.backbone.encode_prompts(self._words, self.class_tokens)

    def forward(self, features: ImageFeatures) -> Scores:
        """Scores of B images: scaled cosines of the pooled feature."""
        features = self.backbone.accept(features)
        return Scores(self.backbone.logit_scale * features.pooled @ self.text_features()[0].T)

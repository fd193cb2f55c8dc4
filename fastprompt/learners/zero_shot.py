"""Zero-shot CLIP: a sentence per class, nothing learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from fastprompt.backbone import Backbone, ImageFeatures
from fastprompt.errors import InputError
from fastprompt.learners.base import Learner, Scores


class ZeroShot(Learner):
    """Zero-shot CLIP (arXiv 2103.00020) with one template.

    Args:
        backbone: the frozen model.
        class_names: C names.
        template: a sentence with one "{}" where the class name stands.
    """

    method: ClassVar[str] = "zero-shot"

    def __init__(self, backbone: Backbone, class_names: Sequence[str], *, template: str = "a photo of a {}.") -> None:
        if template.count("{}") != 1:
            raise InputError(f"template: expected a sentence with one {{}} for the class name, got {template!r}")
        before, after = template.split("{}")
        words = backbone.embed_words(before)[None]  # (1, M, W)
        super().__init__(
            backbone, class_names, context_tokens=words.shape[1], suffix=after, options={"template": template}
        )
        self._words = words

    def encode_text(self) -> Tensor:
        """See ``Learner``; G = 1."""
        return self.backbone.encode_prompts(self._words, self.class_tokens)

    def forward(self, features: ImageFeatures) -> Scores:
        """Scores of B images: scaled cosines of the pooled feature."""
        features = features.to(self.backbone.device)
        return Scores(self.backbone.logit_scale * features.pooled @ self.text_features()[0].T)

"""Learners that compare images with text: class names behind contexts, through the frozen text tower."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from fastprompt_kernels import patch_statistics
from torch import Tensor

from fastprompt.backbone import Backbone, ClassTokens, ImageFeatures
from fastprompt.backbone.kept import Kept
from fastprompt.errors import InputError
from fastprompt.learners.base import OOD_KINDS, Learner, check_prompts
from fastprompt.learners.holder import check_backbone
from fastprompt.learners.templates import encode_templates


class PromptLearner(Learner):
    """A learner whose classes are names behind contexts. A subclass gives ``mean_text`` and ``forward``.

    Args:
        backbone: the frozen model.
        class_names: C names.
        context_tokens: M, tokens in front of the names and behind them.
        suffix: words that follow every name, such as ".".

    Attributes:
        class_tokens: the class names as the text tower reads them.
    """

    class_tokens: ClassTokens

    def __init__(self, backbone: Backbone, class_names: Sequence[str], *, context_tokens: int, suffix: str) -> None:
        self._context_tokens, self._suffix = context_tokens, suffix  # needed as soon as there are class names
        super().__init__(backbone, class_names)

    def _set_classes(self, class_names: Sequence[str]) -> None:
        super()._set_classes(class_names)
        self.class_tokens = self.backbone.tokenize(class_names, self._suffix)
        self.class_tokens.check_distinct()
        self.backbone.check_fits(self._context_tokens, self.class_tokens)
        self._kept = Kept()

    @abstractmethod
    def mean_text(self, features: ImageFeatures) -> tuple[Tensor, Tensor]:
        """Text features averaged over prompts, for the pooled feature and for the patches.

        Args:
            features: of B images.

        Returns:
            Each (C, D), or (B, C, D) where the text depends on the image.
        """

    def hand_crafted(self, *templates: str) -> Tensor:
        """Frozen text features (C, D) of sentences such as "a photo of a {}.", encoded once for these classes."""
        return self._frozen_text(templates, lambda: encode_templates(self.backbone, self.class_names, templates))

    def _frozen_text(self, sentences: object, encode: Callable[[], Tensor]) -> Tensor:
        """What ``encode`` says of these classes, kept until another source of sentences is asked for."""
        return self._kept.get("frozen", encode, (self.backbone.device, self.backbone.dtype, sentences))

    @torch.no_grad()
    def ood_score(self, features: ImageFeatures, kind: str = "gl-mcm") -> Tensor:
        """How far B images are from the classes, (B,); lower is more in-distribution.

        With raw cosines, without temperature: ``mcm`` is minus the largest softmax probability of the pooled feature,
        ``l-mcm`` minus the largest over all patches and classes, and ``gl-mcm`` their sum. Cosines are averaged over
        prompts before the softmax. Source: MCM (arXiv 2211.13445), GL-MCM (arXiv 2304.04521), GalLoP.
        """
        if kind not in OOD_KINDS:
            raise InputError(f"kind: expected one of {', '.join(OOD_KINDS)}, got {kind!r}")
        features = self.backbone.accept(features)
        pooled_text, patch_text = self.mean_text(features)
        score = torch.zeros(len(features), device=self.backbone.device)
        if kind != "l-mcm":
            cosines = (features.pooled[:, None] @ pooled_text.mT).squeeze(1)  # (B, C)
            score = score - (cosines.amax(dim=-1) - cosines.logsumexp(dim=-1)).exp()
        if kind != "mcm":
            score = score - _largest_patch_probability(self.local_features(features), patch_text)
        return score

    @torch.no_grad()
    def explain(self, features: ImageFeatures, class_index: Tensor) -> dict[str, Tensor]:
        """See ``Learner``; one map: by how much a patch's cosine with the class's text exceeds the mean patch's.

        That is what ``ood_score`` reads of the patches; methods whose logits do not read them predict without it.
        """
        features = self.backbone.accept(features)
        text = self.mean_text(features)[1].expand(len(features), -1, -1)  # (B, C, D)
        class_text = text[torch.arange(len(text)), class_index.to(text.device)]  # (B, D)
        cosines = (self.local_features(features) @ class_text[:, :, None]).squeeze(-1)
        return {"more similar than most": (cosines - cosines.mean(dim=1, keepdim=True)).clamp(min=0)}


class TextLearner(PromptLearner):
    """A learner that compares every image with the same text. A subclass gives ``encode_text`` and ``forward``."""

    @abstractmethod
    def encode_text(self) -> Tensor:
        """Text features (G, C, D) of the present contexts, L2-normalised."""

    def text_features(self) -> Tensor:
        """``encode_text``, done once for as long as no gradient is asked for and no learned tensor changes."""
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            return self.encode_text()
        read = (self.backbone.device, self.backbone.dtype, *self.parameters())
        return self._kept.get("text", self.encode_text, read)

    def mean_text(self, features: ImageFeatures | None = None) -> tuple[Tensor, Tensor]:
        """See ``PromptLearner``; each (C, D), whatever the images."""
        mean = self.text_features().mean(dim=0)
        return mean, mean

    def linear_head(self) -> Tensor:
        """See ``Learner``: the mean text of the pooled feature."""
        return self.mean_text()[0]

    def with_constants(self) -> TextLearner:
        """See ``Learner``: the text features are constants."""
        twin, text = super().with_constants(), self.text_features()
        twin.text_features = lambda: text
        return twin


def _largest_patch_probability(patches: Tensor, text: Tensor) -> Tensor:
    """Largest softmax probability (B,) over patches (B, P, D) and classes, text (C, D) or (B, C, D)."""
    if text.dim() == 3:
        each = [_largest_patch_probability(image[None], own) for image, own in zip(patches, text, strict=True)]
        return torch.cat([patches.new_empty(0), *each])
    statistics = patch_statistics(patches, text, entropy=False)
    return (statistics.maximum - statistics.logsumexp).amax(dim=1).exp()


def initial_context(backbone: Backbone, context: int | str) -> Tensor:
    """The start of a learned context, (M, W) in float32.

    Args:
        backbone: gives the token embeddings.
        context: words whose embeddings are the start, or a number of tokens to draw from N(0, 0.02^2), as in CoOp.
    """
    check_backbone(backbone)
    if isinstance(context, int):
        if not 1 <= context <= backbone.context_length:
            raise InputError(f"context: expected 1 to {backbone.context_length} tokens, got {context}")
        return 0.02 * torch.randn(context, backbone.text_width).to(backbone.device)
    words = backbone.embed_words(context).float()
    if not len(words):
        raise InputError(f"context: expected words or a number of tokens, got {context!r}")
    return words


def initial_contexts(backbone: Backbone, context: int | str, prompts: int) -> Tensor:
    """The start (prompts, M, W) of several contexts, each as by ``initial_context``."""
    check_prompts("prompts", prompts)
    return torch.stack([initial_context(backbone, context) for _ in range(prompts)])

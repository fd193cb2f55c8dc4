"""What all learners share: scoring, prediction, out-of-distribution scores, other class names."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from fastprompt_kernels import patch_statistics
from torch import Tensor, nn

from fastprompt.backbone import Backbone, ClassTokens, ImageFeatures
from fastprompt.backbone.backbone import at_least_float32
from fastprompt.errors import InputError

OOD_KINDS = ("mcm", "l-mcm", "gl-mcm")


@dataclass(frozen=True)
class Scores:
    """What a learner says about B images.

    Attributes:
        logits: (B, C), these predict.
        parts: tensors that the learner's loss needs, by name.
    """

    logits: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class Learner(nn.Module, ABC):
    """A classifier on a frozen backbone. A subclass gives its learned tensors, ``text_features`` and ``forward``.

    ``state_dict()`` holds the learned tensors and nothing else: the backbone is not a submodule.

    Attributes:
        method: name of the method, as on the command line.
        backbone: the frozen model.
        class_names: the C classes.
        options: the arguments beside backbone and class names from which the learner was made.
    """

    method: ClassVar[str]
    backbone: Backbone
    class_names: tuple[str, ...]
    class_tokens: ClassTokens

    def __init__(
        self, backbone: Backbone, class_names: Sequence[str], *, context_tokens: int, suffix: str, options: dict
    ) -> None:
        super().__init__()
        object.__setattr__(self, "backbone", backbone)  # past nn.Module, which would register it as a submodule
        self.options = options
        self._context_tokens, self._suffix = context_tokens, suffix
        self._set_classes(class_names)

    def _set_classes(self, class_names: Sequence[str]) -> None:
        self.class_tokens = self.backbone.tokenize(class_names, self._suffix)
        self.backbone.check_fits(self._context_tokens, self.class_tokens)
        self.class_names = self.class_tokens.class_names
        self._text_memo: tuple[tuple, Tensor] | None = None

    @abstractmethod
    def encode_text(self) -> Tensor:
        """Text features (G, C, D) of the present contexts, L2-normalised."""

    @abstractmethod
    def forward(self, features: ImageFeatures) -> Scores:
        """Scores of B images."""

    def loss(self, scores: Scores, labels: Tensor) -> Tensor:
        """Cross-entropy of the logits with labels (B,), a scalar."""
        return F.cross_entropy(scores.logits, labels.to(scores.logits.device))

    def text_features(self) -> Tensor:
        """``encode_text``, done once for as long as no gradient is asked for and no learned tensor changes."""
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            return self.encode_text()
        learned = ((parameter.data_ptr(), parameter._version) for parameter in self.parameters())
        key = (self.backbone.device, self.backbone.dtype, *learned)
        if self._text_memo is None or self._text_memo[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._text_memo = key, self.encode_text()
        return self._text_memo[1]

    def local_features(self, features: ImageFeatures) -> Tensor:
        """Patch features (B, P, D) in the joint space, L2-normalised."""
        return F.normalize(at_least_float32(self.backbone.project_patches(features.patches)), dim=-1)

    def mean_text(self) -> tuple[Tensor, Tensor]:
        """Text features (C, D) averaged over prompts, for the pooled feature and for the patches."""
        mean = self.text_features().mean(dim=0)
        return mean, mean

    @torch.no_grad()
    def predict(self, features: ImageFeatures) -> Tensor:
        """Class probabilities (B, C)."""
        return self(features).logits.softmax(dim=-1)

    @torch.no_grad()
    def ood_score(self, features: ImageFeatures, kind: str = "gl-mcm") -> Tensor:
        """How far B images are from the classes, (B,); lower is more in-distribution.

        With raw cosines, without temperature: ``mcm`` is minus the largest softmax probability of the pooled feature,
        ``l-mcm`` minus the largest over all patches and classes, and ``gl-mcm`` their sum. Cosines are averaged over
        prompts before the softmax. Source: MCM (arXiv 2211.13445), GL-MCM (arXiv 2304.04521), GalLoP.
        """
        if kind not in OOD_KINDS:
            raise InputError(f"kind: expected one of {', '.join(OOD_KINDS)}, got {kind!r}")
        features = features.to(self.backbone.device)
        of_pooled, of_patches = self.mean_text()
        score = torch.zeros(len(features), device=self.backbone.device)
        if kind != "l-mcm":
            score = score - _largest_probability(features.pooled @ of_pooled.T)
        if kind != "mcm":
            patches = self.local_features(features)
            statistics = patch_statistics(patches, of_patches)
            score = score - (statistics.maximum - statistics.logsumexp).amax(dim=1).exp()
        return score

    def with_class_names(self, class_names: Sequence[str]) -> Learner:
        """The same learned tensors, shared and not copied, for other classes."""
        other = copy.copy(self)
        other._set_classes(class_names)
        return other


def _largest_probability(cosines: Tensor) -> Tensor:
    """Largest softmax probability over the last axis, from its maximum and log-sum-exp."""
    return (cosines.amax(dim=-1) - cosines.logsumexp(dim=-1)).exp()


def initial_context(backbone: Backbone, context: str | int) -> Tensor:
    """The start of a learned context, (M, W) in float32.

    Args:
        backbone: gives the token embeddings.
        context: words whose embeddings are the start, or a number of tokens to draw from N(0, 0.02^2), as in CoOp.
    """
    if isinstance(context, int):
        if context < 1:
            raise InputError(f"context: expected at least 1 token, got {context}")
        return 0.02 * torch.randn(context, backbone.text_width).to(backbone.device)
    words = backbone.embed_words(context).float()
    if not len(words):
        raise InputError(f"context: expected words or a number of tokens, got {context!r}")
    return words

"""What all learners share: scoring, prediction, out-of-distribution scores, other class names."""

from __future__ import annotations

import copy
import inspect
import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from fastprompt_kernels import patch_statistics
from torch import Tensor

from fastprompt.backbone import Backbone, ClassTokens, ImageFeatures
from fastprompt.backbone.backbone import at_least_float32
from fastprompt.errors import InputError
from fastprompt.learners.holder import BackboneHolder, check_backbone
from fastprompt.learners.memo import Memo
from fastprompt.learners.recipe import Recipe
from fastprompt.learners.stored import HubLearner
from fastprompt.learners.templates import encode_templates

if TYPE_CHECKING:
    from fastprompt.training import FeatureSource

METHODS: dict[str, type[Learner]] = {}  # every method by its name, entered when its class is made

MOST_PROMPTS = 10_000
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


class Learner(HubLearner, BackboneHolder, ABC):
    """A classifier on a frozen backbone. A subclass gives its learned tensors, ``encode_text`` and ``forward``.

    ``state_dict()`` holds the learned tensors and nothing else: the backbone is not a submodule. A subclass that names
    its ``method`` is entered into ``METHODS``; its keyword arguments and their descriptions become the options of
    ``fastprompt train``. ``docs/add_a_method.md`` shows a whole one.

    Attributes:
        method: name of the method, as on the command line.
        learns: whether there is anything to train.
        recipes: how the method was published: "default", and by data set where that differs.
        backbone: the frozen model.
        class_names: the C classes.
        options: the arguments beside backbone and class names from which the learner was made.
        files: options that name files, whose contents belong to a run.
        telling: options that ``repr`` shows beside those that are not at their defaults.
        class_specific: whether learned tensors belong to single classes, so that other classes cannot be named.
    """

    method: ClassVar[str]
    learns: ClassVar[bool] = True
    recipes: ClassVar[Mapping[str, Recipe]]
    files: ClassVar[tuple[str, ...]] = ()
    telling: ClassVar[tuple[str, ...]] = ()
    class_specific: bool = False
    class_names: tuple[str, ...]
    class_tokens: ClassTokens

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        if "method" not in cls.__dict__:
            return
        known = METHODS.get(cls.method, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):  # a notebook may repeat a cell
            taken = f"{known.__module__}.{known.__qualname__}"
            raise InputError(f"method {cls.method!r} of {cls.__qualname__} is the name of another method, {taken}")
        if "default" not in cls.__dict__.get("recipes", {}):  # inherited ones would claim another method's numbers
            raise InputError(f"recipes of {cls.__qualname__}: expected a recipe named 'default', got none")
        METHODS[cls.method] = cls

    def __init__(
        self, backbone: Backbone, class_names: Sequence[str], *, context_tokens: int, suffix: str, options: dict
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.options = options
        self._context_tokens, self._suffix = context_tokens, suffix
        self._set_classes(class_names)

    def __repr__(self) -> str:
        """Such as GalLoP(64 classes, ViT-B-16 openai, k=(5, 10, 15, 20), 606,208 learned)."""
        classes, learned = len(self.class_names), sum(parameter.numel() for parameter in self.parameters())
        parameters = inspect.signature(type(self).__init__).parameters
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in self.options.items()}
        shown = (name for name in given if name in self.telling or given[name] != parameters[name].default)
        options = (f"{name}={reprlib.repr(given[name])}" for name in shown)
        size = f"{classes} class{'es' * (classes != 1)}"
        return f"{type(self).__name__}({', '.join([size, self.backbone_label, *options, f'{learned:,} learned'])})"

    def _set_classes(self, class_names: Sequence[str]) -> None:
        self.class_tokens = self.backbone.tokenize(class_names, self._suffix)
        self.class_tokens.check_distinct()
        self.backbone.check_fits(self._context_tokens, self.class_tokens)
        self.class_names = self.class_tokens.class_names
        self._text_memo, self._frozen_memo = Memo(), Memo()

    @abstractmethod
    def encode_text(self) -> Tensor:
        """Text features (G, C, D) of the present contexts, L2-normalised."""

    @abstractmethod
    def forward(self, features: ImageFeatures) -> Scores:
        """Scores of B images."""

    def loss(self, scores: Scores, labels: Tensor) -> Tensor:
        """Cross-entropy of the logits with labels (B,), a scalar."""
        return F.cross_entropy(scores.logits, labels.to(scores.logits.device))

    def check(self) -> None:
        """Raise ``InputError`` where what training will read is not there; called before any image is encoded."""

    def prepare(self, source: FeatureSource) -> None:
        """Called once before training, and again when a run is resumed; nothing by default.

        Args:
            source: the training images; ``source.plain_batches()`` yields them all without augmentation.
        """

    def backward(self, scores: Scores, labels: Tensor) -> Tensor:
        """Leave the gradients of one step on the learned tensors, and return the detached loss, a scalar."""
        loss = self.loss(scores, labels)
        loss.backward()
        return loss.detach()

    def text_features(self) -> Tensor:
        """``encode_text``, done once for as long as no gradient is asked for and no learned tensor changes."""
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            return self.encode_text()
        return self._text_memo.get(self.encode_text, (self.backbone.device, self.backbone.dtype), self.parameters())

    def local_features(self, features: ImageFeatures) -> Tensor:
        """Patch features (B, P, D) in the joint space, L2-normalised."""
        return F.normalize(at_least_float32(self.backbone.project_patches(features.patches)), dim=-1)

    def hand_crafted(self, *templates: str) -> Tensor:
        """Frozen text features (C, D) of sentences such as "a photo of a {}.", encoded once for these classes."""
        return self._frozen_text(templates, lambda: encode_templates(self.backbone, self.class_names, templates))

    def _frozen_text(self, sentences: object, encode: Callable[[], Tensor]) -> Tensor:
        """What ``encode`` says of these classes, kept until another source of sentences is asked for."""
        return self._frozen_memo.get(encode, (self.backbone.device, self.backbone.dtype, sentences))

    def mean_text(self, features: ImageFeatures) -> tuple[Tensor, Tensor]:
        """Text features averaged over prompts, for the pooled feature and for the patches.

        Args:
            features: of B images.

        Returns:
            Each (C, D), or (B, C, D) where the text depends on the image.
        """
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
        features = self.backbone.accept(features)
        of_pooled, of_patches = self.mean_text(features)
        score = torch.zeros(len(features), device=self.backbone.device)
        if kind != "l-mcm":
            cosines = (features.pooled[:, None] @ of_pooled.mT).squeeze(1)  # (B, C)
            score = score - (cosines.amax(dim=-1) - cosines.logsumexp(dim=-1)).exp()
        if kind != "mcm":
            score = score - _largest_patch_probability(self.local_features(features), of_patches)
        return score

    @torch.no_grad()
    def explain(self, features: ImageFeatures, class_index: Tensor) -> dict[str, Tensor]:
        """Which patches speak for a class, one class an image: maps (B, P) of weights of at least 0, by their titles.

        By default one map: by how much the cosine of a patch with the class's text exceeds that of the image's mean.
        That is what ``ood_score`` reads of the patches; methods whose logits do not read them predict without it.

        Args:
            features: of B images.
            class_index: (B,).
        """
        features = self.backbone.accept(features)
        text = self.mean_text(features)[1].expand(len(features), -1, -1)  # (B, C, D)
        of_class = text[torch.arange(len(text)), class_index.to(text.device)]  # (B, D)
        cosines = (self.local_features(features) @ of_class[:, :, None]).squeeze(-1)
        return {"more similar than most": (cosines - cosines.mean(dim=1, keepdim=True)).clamp(min=0)}

    def with_class_names(self, class_names: Sequence[str]) -> Learner:
        """The same learned tensors, shared and not copied, for other classes.

        Raises:
            InputError: a name does not fit behind the context, or the learned tensors belong to the present classes.
        """
        if self.class_specific and tuple(class_names) != self.class_names:
            raise InputError(
                f"class_names: {self.method} learned a context for each of its {len(self.class_names)} classes, so "
                f"expected {', '.join(self.class_names[:3])}, ..., got {', '.join(class_names[:3])}, ..."
            )
        other = copy.copy(self)
        other._set_classes(class_names)
        return other


def _largest_patch_probability(patches: Tensor, text: Tensor) -> Tensor:
    """Largest softmax probability (B,) over patches (B, P, D) and classes, text (C, D) or (B, C, D)."""
    if text.dim() == 3:
        each = [_largest_patch_probability(image[None], own) for image, own in zip(patches, text, strict=True)]
        return torch.cat([patches.new_empty(0), *each])
    statistics = patch_statistics(patches, text, entropy=False)
    return (statistics.maximum - statistics.logsumexp).amax(dim=1).exp()


def check_weight(name: str, weight: float) -> None:
    """Raise ``InputError`` unless the weight of a term is a finite number of at least 0."""
    if not 0 <= weight < math.inf:
        raise InputError(f"{name}: expected a finite number of at least 0, got {weight}")


def check_prompts(name: str, prompts: int) -> None:
    """Raise ``InputError`` unless a number of prompts is at least 1 and no slip of the keyboard."""
    if not 1 <= prompts <= MOST_PROMPTS:
        raise InputError(f"{name}: expected 1 to {MOST_PROMPTS:,}, got {prompts}")


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

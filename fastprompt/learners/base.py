"""What all learners share, and what each declares of itself. Nothing here knows of text: see ``text.py``."""

from __future__ import annotations

import copy
import inspect
import math
import reprlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastprompt.backbone import Backbone, ImageFeatures
from fastprompt.backbone.class_tokens import check_class_names
from fastprompt.errors import InputError
from fastprompt.learners.holder import BackboneHolder
from fastprompt.learners.local import unit_patches
from fastprompt.learners.loss import class_cross_entropy
from fastprompt.learners.recipe import Recipe
from fastprompt.learners.stored import HubLearner
from fastprompt.sources import PATCHES, POOLED, FeatureSource

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
    """A classifier on a frozen backbone. A subclass gives its learned tensors and ``forward``.

    ``state_dict()`` holds the learned tensors and nothing else: the backbone is not a submodule. A subclass that names
    its ``method`` is entered into ``METHODS``; its keyword arguments and their descriptions become the options of
    ``fastprompt train``. ``docs/add_a_method.md`` shows a whole one.

    Attributes:
        method: name of the method, as on the command line.
        learns: whether there is anything to train.
        recipes: how the method was published: "default", and by data set where that differs.
        files: options that name files, whose contents belong to a run.
        reads: what ``forward`` and ``loss`` read of an image: ``POOLED``, or ``PATCHES`` for both.
        fixed_text: whether an image is compared with the same text features as every other.
        independent_images: whether the scores of an image do not depend on the other images of its batch.
        contexts_named: names of the learned tensors that are contexts, (..., M, W).
        foreign_names: what published checkpoints of this very class call its tensors, and what they are called here, or
            None for those that nobody needs.
        keeps_underscores: whether the published code reads class names as they are written.
        telling: options that ``repr`` shows beside those that are not at their defaults.
        class_specific: whether learned tensors belong to single classes, so that other classes cannot be named.
        backbone: the frozen model.
        class_names: the C classes.
        options: the keyword arguments of the constructor, recorded for every learner that is made.
    """

    method: ClassVar[str]
    learns: ClassVar[bool] = True
    recipes: ClassVar[Mapping[str, Recipe]]
    reads: ClassVar[frozenset[str]] = PATCHES
    fixed_text: ClassVar[bool] = True
    independent_images: ClassVar[bool] = True
    contexts_named: ClassVar[tuple[str, ...]] = ()
    foreign_names: ClassVar[Mapping[str, str | None]] = {}
    keeps_underscores: ClassVar[bool] = False
    files: ClassVar[tuple[str, ...]] = ()
    telling: ClassVar[tuple[str, ...]] = ()
    class_specific: bool = False
    __signature__: ClassVar[inspect.Signature]
    class_names: tuple[str, ...]
    options: dict[str, Any]

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        signature = inspect.signature(cls.__init__)
        _, *parameters = signature.parameters.values()
        cls.__signature__ = signature.replace(parameters=parameters)  # help() would show that of __new__
        if "method" not in cls.__dict__:
            return
        known = METHODS.get(cls.method, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):  # a notebook may repeat a cell
            taken = f"{known.__module__}.{known.__qualname__}"
            raise InputError(f"method {cls.method!r} of {cls.__qualname__} is the name of another method, {taken}")
        if "default" not in cls.__dict__.get("recipes", {}):  # inherited ones would claim another method's numbers
            raise InputError(f"recipes of {cls.__qualname__}: expected a recipe named 'default', got none")
        if foreign := [str(one) for one in parameters[2:] if one.kind is not one.KEYWORD_ONLY]:
            raise InputError(
                f"constructor of {cls.__qualname__}: expected (self, backbone, class_names, *, options by name), got "
                f"{foreign[0]}"  # which would not be recorded
            )
        METHODS[cls.method] = cls

    def __new__(cls, *args: object, **kwargs: object) -> Learner:
        """Record the options, so that no subclass can forget one of them."""
        learner = super().__new__(cls, *args, **kwargs)
        given = {name: kwargs.get(name, parameter.default) for name, parameter in cls.option_parameters().items()}
        learner.__dict__["options"] = {n: list(v) if isinstance(v, tuple) else v for n, v in given.items()}  # as JSON
        return learner

    def __init__(self, backbone: Backbone, class_names: Sequence[str]) -> None:
        super().__init__()
        self.backbone = backbone
        self._set_classes(class_names)

    @classmethod
    def option_parameters(cls) -> dict[str, inspect.Parameter]:
        """The keyword arguments of the constructor, by name."""
        parameters = inspect.signature(cls.__init__).parameters
        return {name: parameter for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}

    @classmethod
    def recognises(cls, state: Mapping[str, Tensor]) -> int:
        """How many tensors of a published ``state_dict`` are this method's: that which knows most of them takes it."""
        return len(vars(cls).get("foreign_names", {}).keys() & state.keys())

    @classmethod
    def read_foreign(cls, state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The options of the learner that a published checkpoint holds; by default the length of its one context.

        Args:
            state: all tensors of ``foreign_names``, under the names of the published code.
            arguments: of its training script, where it stored them.

        Raises:
            InputError: tensors or arguments that do not belong together.
        """
        contexts = [theirs for theirs, ours in cls.foreign_names.items() if ours in cls.contexts_named]
        own = "context" in cls.option_parameters() and len(contexts) == 1
        return {"context": check_axes(state, contexts[0], 2).shape[0]} if own else {}

    def __repr__(self) -> str:
        """Such as GalLoP(64 classes, ViT-B-16 openai, k=(5, 10, 15, 20), 606,208 learned)."""
        classes, learned = len(self.class_names), sum(parameter.numel() for parameter in self.parameters())
        parameters = self.option_parameters()
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in self.options.items()}
        shown = (name for name in given if name in self.telling or given[name] != parameters[name].default)
        options = (f"{name}={reprlib.repr(given[name])}" for name in shown)
        size = f"{classes} class{'es' * (classes != 1)}"
        return f"{type(self).__name__}({', '.join([size, self.backbone_label, *options, f'{learned:,} learned'])})"

    def _set_classes(self, class_names: Sequence[str]) -> None:
        self.class_names = check_class_names(class_names)

    @abstractmethod
    def forward(self, features: ImageFeatures) -> Scores:
        """Scores of B images."""

    def loss(self, scores: Scores, labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """What is minimised, a scalar; by default the cross-entropy of the logits.

        Args:
            scores: of B images.
            labels: (B,), on any device.
            generator: of the scores' device, from which all random numbers come; None for torch's own.
        """
        return class_cross_entropy(scores.logits, labels)

    def check(self) -> None:
        """Raise ``InputError`` where what training will read is not there; called before any image is encoded."""

    def prepare(self, source: FeatureSource) -> None:
        """Called once before training, and again when a run is resumed; nothing by default.

        Args:
            source: the training images; ``source.plain_batches()`` yields them all without augmentation.
        """

    def backward(self, scores: Scores, labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Leave the gradients of one step on the learned tensors, and return the detached ``loss``."""
        loss = self.loss(scores, labels, generator=generator)
        loss.backward()
        return loss.detach()

    def local_features(self, features: ImageFeatures) -> Tensor:
        """Patch features (B, P, D) in the joint space, L2-normalised."""
        return unit_patches(self.backbone.project_patches(features.patches))

    @torch.no_grad()
    def predict(self, features: ImageFeatures) -> Tensor:
        """Class probabilities (B, C)."""
        return self(features).logits.softmax(dim=-1)

    @classmethod
    def ood_reads(cls, kind: str) -> frozenset[str]:
        """What ``ood_score`` reads of an image, as in ``reads``."""
        return PATCHES if kind != "mcm" else POOLED if cls.fixed_text else cls.reads

    def ood_score(self, features: ImageFeatures, kind: str = "gl-mcm") -> Tensor:
        """How far B images are from the classes, (B,); lower is more in-distribution.

        Raises:
            InputError: a method without such a score, or another ``kind`` than those of ``OOD_KINDS``.
        """
        raise InputError(f"kind: expected a method with out-of-distribution scores, got {self.method}")

    def explain(self, features: ImageFeatures, class_index: Tensor) -> dict[str, Tensor]:
        """Which patches speak for a class, one class an image: maps (B, P) of weights of at least 0, by their titles.

        Args:
            features: of B images, with their patches.
            class_index: (B,).

        Raises:
            InputError: a method that cannot say so.
        """
        raise InputError(f"explain: expected a method that weighs patches, got {self.method}")

    def linear_head(self) -> Tensor | None:
        """The matrix (C, D) that pooled features are compared with; None where there is none."""
        return None

    def with_constants(self) -> Learner:
        """The same learner with everything that does not depend on an image computed once and for all, for export."""
        return copy.copy(self)

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


def check_axes(state: Mapping[str, Tensor], name: str, *axes: int) -> Tensor:
    """The tensor of that name; ``InputError`` unless it has one of these numbers of axes."""
    if state[name].dim() not in axes:
        expected = " or ".join(map(str, axes))
        raise InputError(f"{name}: expected a tensor with {expected} axes, got shape {tuple(state[name].shape)}")
    return state[name]


def check_weight(name: str, weight: float) -> None:
    """Raise ``InputError`` unless the weight of a term is a finite number of at least 0."""
    if not 0 <= weight < math.inf:
        raise InputError(f"{name}: expected a finite number of at least 0, got {weight}")


def check_prompts(name: str, prompts: int) -> None:
    """Raise ``InputError`` unless a number of prompts is at least 1 and no slip of the keyboard."""
    if not 1 <= prompts <= MOST_PROMPTS:
        raise InputError(f"{name}: expected 1 to {MOST_PROMPTS:,}, got {prompts}")

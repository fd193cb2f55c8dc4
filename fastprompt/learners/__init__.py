"""Prompt learners, one file a method. Every module of this folder is imported, so that a new file is a new method."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules

from fastprompt.backbone import Backbone
from fastprompt.errors import InputError
from fastprompt.learners.base import METHODS, OOD_KINDS, Learner, Scores
from fastprompt.learners.recipe import Recipe

for _module in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")
_classes = {learner.__name__: learner for learner in METHODS.values()}
globals().update(_classes)  # fastprompt.learners.CoOp, and so on


def find_method(method: str) -> type[Learner]:
    """The class of a method by its name, as on the command line."""
    if method not in METHODS:
        raise InputError(f"method: expected one of {', '.join(sorted(METHODS))}, got {method!r}")
    return METHODS[method]


def make_learner(method: str, backbone: Backbone, class_names: Sequence[str], **options: object) -> Learner:
    """The learner of a method by its name, as in a run folder; ``options`` as in its class."""
    return find_method(method)(backbone, class_names, **options)


__all__ = ["METHODS", "OOD_KINDS", "Learner", "Recipe", "Scores", "find_method", "make_learner", *_classes]

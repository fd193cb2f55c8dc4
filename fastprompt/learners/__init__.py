"""Prompt learners, one file a method."""

from __future__ import annotations

from collections.abc import Sequence

from fastprompt.backbone import Backbone
from fastprompt.errors import InputError
from fastprompt.learners.base import OOD_KINDS, Learner, Scores
from fastprompt.learners.coop import CoOp
from fastprompt.learners.gallop import GalLoP
from fastprompt.learners.zero_shot import ZeroShot

METHODS: dict[str, type[Learner]] = {learner.method: learner for learner in (ZeroShot, CoOp, GalLoP)}


def make_learner(method: str, backbone: Backbone, class_names: Sequence[str], **options: object) -> Learner:
    """The learner of a method by its name, as in a run folder; ``options`` as in its class."""
    if method not in METHODS:
        raise InputError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    return METHODS[method](backbone, class_names, **options)


__all__ = ["METHODS", "OOD_KINDS", "CoOp", "GalLoP", "Learner", "Scores", "ZeroShot", "make_learner"]

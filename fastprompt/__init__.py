"""fastprompt: fast, exact prompt learning for CLIP-like models.

    backbone = fastprompt.load_backbone("ViT-B-16-quickgelu", "openai")
    learner = fastprompt.GalLoP(backbone, ["cat", "dog"])
    scores = learner(backbone.encode_images(images))
    learner.loss(scores, labels).backward()

Names are imported when they are first used, so that ``import fastprompt`` costs no more than ``import torch``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fastprompt.errors import InputError
from fastprompt.version import __version__

if TYPE_CHECKING:
    from fastprompt.backbone import Backbone, ClassTokens, ImageFeatures, load_backbone
    from fastprompt.learners import CoOp, GalLoP, Learner, Scores, ZeroShot, make_learner

_HOMES = {
    **dict.fromkeys(("Backbone", "ClassTokens", "ImageFeatures", "load_backbone"), "fastprompt.backbone"),
    **dict.fromkeys(("CoOp", "GalLoP", "Learner", "Scores", "ZeroShot", "make_learner"), "fastprompt.learners"),
}

__all__ = [
    "Backbone",
    "ClassTokens",
    "CoOp",
    "GalLoP",
    "ImageFeatures",
    "InputError",
    "Learner",
    "Scores",
    "ZeroShot",
    "__version__",
    "load_backbone",
    "make_learner",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastprompt' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__

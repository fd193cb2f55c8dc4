"""fastprompt: fast, exact prompt learning for CLIP-like models.

    backbone = fastprompt.load_backbone("ViT-B-16-quickgelu", "openai")
    learner = fastprompt.GalLoP(backbone, ["cat", "dog"])
    scores = learner(backbone.encode_images(images))
    learner.loss(scores, labels).backward()

Names and rooms are imported when they are first used, so that ``import fastprompt`` costs no more than
``import torch``. ``make docs`` lists them all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from fastprompt.errors import InputError
from fastprompt.version import __version__

if TYPE_CHECKING:
    from fastprompt import backbone, data, evaluation, exchange, experiment, layers, learners, report, sources, training
    from fastprompt.backbone import Backbone, ClassTokens, ImageFeatures, load_backbone
    from fastprompt.data import Dataset, LabelledImages, few_shot, load_dataset, load_image, select_classes
    from fastprompt.evaluation import base_to_new, evaluate_accuracy, ood_detection
    from fastprompt.experiment.runs import load_run
    from fastprompt.experiment.sources import feature_source, image_transform
    from fastprompt.learners import (
        METHODS,
        PLOT,
        SOTGLP,
        CoCoOp,
        CoOp,
        CoPL,
        DuAlPT,
        DualView,
        GalLoP,
        KgCoOp,
        Learner,
        LoCoOp,
        ProGrad,
        Recipe,
        Scores,
        TextLearner,
        ZeroShot,
        find_method,
        make_learner,
    )
    from fastprompt.sources import as_source
    from fastprompt.training import TrainingSettings, fit, published_settings

_ROOMS = (
    "backbone",
    "data",
    "evaluation",
    "exchange",
    "experiment",
    "layers",
    "learners",
    "report",
    "sources",
    "training",
)

_HOMES = {
    "backbone": ("Backbone", "ClassTokens", "ImageFeatures", "load_backbone"),
    "data": ("Dataset", "LabelledImages", "few_shot", "load_dataset", "load_image", "select_classes"),
    "evaluation": ("base_to_new", "evaluate_accuracy", "ood_detection"),
    "experiment.sources": ("feature_source", "image_transform"),
    "experiment.runs": ("load_run",),
    "learners": (
        *("METHODS", "Learner", "Recipe", "Scores", "TextLearner", "find_method", "make_learner"),
        *("CoCoOp", "CoOp", "CoPL", "DuAlPT", "DualView", "GalLoP", "KgCoOp", "LoCoOp", "PLOT", "ProGrad", "SOTGLP"),
        "ZeroShot",
    ),
    "sources": ("as_source",),
    "training": ("TrainingSettings", "fit", "published_settings"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "METHODS",
    "PLOT",
    "SOTGLP",
    "Backbone",
    "ClassTokens",
    "CoCoOp",
    "CoOp",
    "CoPL",
    "Dataset",
    "DuAlPT",
    "DualView",
    "GalLoP",
    "ImageFeatures",
    "InputError",
    "KgCoOp",
    "LabelledImages",
    "Learner",
    "LoCoOp",
    "ProGrad",
    "Recipe",
    "Scores",
    "TextLearner",
    "TrainingSettings",
    "ZeroShot",
    "__version__",
    "as_source",
    "backbone",
    "base_to_new",
    "data",
    "evaluate_accuracy",
    "evaluation",
    "exchange",
    "experiment",
    "feature_source",
    "few_shot",
    "find_method",
    "fit",
    "image_transform",
    "layers",
    "learners",
    "load_backbone",
    "load_dataset",
    "load_image",
    "load_run",
    "make_learner",
    "ood_detection",
    "published_settings",
    "report",
    "select_classes",
    "sources",
    "training",
]


def __getattr__(name: str) -> object:
    if name in _ROOMS:
        return import_module(f"fastprompt.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'fastprompt' has no attribute {name!r}")
    return getattr(import_module(f"fastprompt.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return __all__

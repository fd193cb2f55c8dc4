"""How every method is trained and tested on the demo's scenes: on half of the classes, asked for all of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from fastprompt.data import few_shot, select_classes
from fastprompt.demo.experiment import EPOCHS, GALLOP_K, SHOTS, Materials, halves
from fastprompt.demo.objects import CLUTTER
from fastprompt.evaluation import evaluate_accuracy, ood_detection
from fastprompt.experiment.config import FeatureConfig
from fastprompt.experiment.sources import feature_source
from fastprompt.learners import Learner, make_learner
from fastprompt.sources import FeatureSource
from fastprompt.training import fit, published_settings

RATE = 10  # times the recipe's learning rate, because there are 12 epochs instead of 50 to 200
DESCRIPTIONS = "descriptions.json"


@dataclass(frozen=True)
class Setting:
    """How a method is trained here; decay and warm-up are those of its default recipe."""

    method: str
    options: Mapping[str, object] = field(default_factory=dict)
    epochs: int = EPOCHS
    batch_size: int = 32


# Numbers of patches are scaled from 196 to the demo's 64. CoCoOp and CoPL encode every class for every image: they see
# a quarter of the images, in as many steps.
SETTINGS: dict[str, Setting] = {
    "zero-shot": Setting("zero-shot"),
    "coop": Setting("coop"),
    "cocoop": Setting("cocoop", epochs=3, batch_size=8),
    "copl": Setting("copl", epochs=3, batch_size=8),
    "kgcoop": Setting("kgcoop"),
    "prograd": Setting("prograd"),
    "locoop": Setting("locoop"),
    "dual-view": Setting("dual-view"),
    "plot": Setting("plot"),
    "plot, with pooled": Setting("plot", {"pooled": True}),
    "dualpt": Setting("dualpt", {"descriptions": DESCRIPTIONS}),
    "gallop": Setting("gallop", {"k": GALLOP_K}),
    "sot-glp": Setting("sot-glp", {"patches": 3}),
}


def write_descriptions(class_names: Sequence[str], file: Path) -> None:
    """What DuAl-PT reads about each class: sentences such as a language model might write, in the demo's words."""
    sentences = [f"a {size} {{}} among {kind}." for size in ("tiny", "small") for kind in CLUTTER]
    entries = {name: [sentence.format(name) for sentence in sentences] for name in class_names}
    file.write_text(json.dumps(entries, indent=1), encoding="utf-8")


def make(setting: Setting, materials: Materials, class_names: Sequence[str], scenes: Path) -> Learner:
    """The learner of a setting, before any training."""
    options = dict(setting.options)
    if "descriptions" in options:
        options["descriptions"] = str(scenes / DESCRIPTIONS)
    return make_learner(setting.method, materials.backbone, class_names, **options)


def run_trial(setting: Setting, seed: int, materials: Materials, scenes: Path) -> dict[str, float | str]:
    """Train on the base classes with one seed, and test: fractions, "" for what cannot be asked."""
    base, new = (half.class_names for half in halves(materials.dataset))
    torch.manual_seed(seed)  # random contexts
    learner = make(setting, materials, base, scenes)
    if learner.learns:
        published = published_settings(learner.recipes["default"], SHOTS)
        changed = {"epochs": setting.epochs, "batch_size": setting.batch_size, "lr": RATE * published.lr, "seed": seed}
        fit(learner, training_source(seed, materials, scenes), replace(published, **changed))
    of_base, of_new = materials.halves
    detection = ood_detection(learner, of_base, materials.unknown)
    on_new = "" if learner.class_specific else evaluate_accuracy(learner.with_class_names(new), of_new).top1
    on_base = evaluate_accuracy(learner, of_base).top1
    return {"base": on_base, "new": on_new, "fpr95": detection.fpr95, "auroc": detection.auroc}


def training_source(seed: int, materials: Materials, scenes: Path) -> FeatureSource:
    """Cached features of the training images of the base classes."""
    images = few_shot(select_classes(materials.dataset.train, "base"), SHOTS, seed)
    return feature_source(images, materials.backbone, FeatureConfig(cache_dir=scenes / "cache"))

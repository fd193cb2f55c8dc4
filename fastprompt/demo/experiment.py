"""The demo: zero-shot CLIP, CoOp and GalLoP on the built-in scenes, over seeds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from fastprompt.backbone import Backbone, load_backbone
from fastprompt.data import Dataset, LabelledImages, find_images, load_dataset, select_classes
from fastprompt.demo.scenes import DOMAINS, write_dataset
from fastprompt.evaluation import base_to_new, evaluate_accuracy, ood_detection
from fastprompt.experiment.config import FeatureConfig
from fastprompt.experiment.configure import configure
from fastprompt.experiment.runs import load_run
from fastprompt.experiment.sources import feature_source, split_of, unlabelled
from fastprompt.experiment.train import train_run
from fastprompt.learners import GalLoP, Learner, ZeroShot
from fastprompt.sources import FeatureSource
from fastprompt.training import RunFolder, epoch_metrics

SEEDS = (1, 2, 3)
SHOTS = 16

# As published, but for the epochs, of which a small model needs fewer, and GalLoP's k, scaled from 196 patches to 64.
EPOCHS = 12
GALLOP_K = (2, 3, 5, 7)
TRAINED: dict[str, dict] = {"coop": {}, "gallop": {"k": GALLOP_K}}
UNTRAINED = {"gallop": "gallop, untrained"}  # name of the row: its start, which adds patches to zero-shot CLIP


@dataclass(frozen=True)
class Materials:
    """What every method is tested on.

    Attributes:
        backbone: the built-in model.
        dataset: the scenes; its test images are ``test``.
        test: features of the test images.
        halves: features of the test images of the base and of the new classes.
        domains: features of the same classes in shifted renderings, by name.
        unknown: features of objects that are in no class.
    """

    backbone: Backbone
    dataset: Dataset
    test: FeatureSource
    halves: tuple[FeatureSource, FeatureSource]
    domains: dict[str, FeatureSource]
    unknown: FeatureSource


@dataclass(frozen=True)
class Trial:
    """What one method did with one seed; accuracies and rates are fractions.

    Attributes:
        run: of training on all classes; None where nothing was trained.
        measures: "accuracy", "base", "new", one for each domain, "fpr95", "auroc", and, where something was trained,
            "seconds" and "memory" (bytes) of training on all classes.
    """

    run: RunFolder | None
    measures: dict[str, float]


@dataclass(frozen=True)
class DemoResult:
    """All trials of the demo, by method, and how long the whole took."""

    materials: Materials
    trials: dict[str, list[Trial]]
    seconds: float


def run_experiment(out: Path) -> DemoResult:
    """Render the scenes, train and test every method with every seed. What is in ``out`` already is not done again."""
    started = time.perf_counter()
    materials = prepare(out)
    names = materials.dataset.test.class_names
    untrained = ZeroShot(materials.backbone, names), GalLoP(materials.backbone, names, k=GALLOP_K)
    trials = {UNTRAINED.get(learner.method, learner.method): [_untrained(learner, materials)] for learner in untrained}
    for method, options in TRAINED.items():
        trials[method] = [
            _trained(method, {**options, "epochs": EPOCHS, "seed": seed, "shots": SHOTS}, materials, out)
            for seed in SEEDS
        ]
    return DemoResult(materials, trials, time.perf_counter() - started)


def _render_once(folder: Path) -> Path:
    """The scenes in ``folder``, rendered under another name first, so that the folder is whole or absent."""
    if not folder.is_dir():
        write_dataset(unfinished := folder.with_suffix(".unfinished"))
        unfinished.rename(folder)
    return folder


def prepare(out: Path) -> Materials:
    """The scenes and their features, in ``out``; what is there already is not made again."""
    data, features = _render_once(out / "data"), FeatureConfig(cache_dir=out / "cache")
    backbone = load_backbone("demo")
    dataset = load_dataset(data)
    domains = {name: split_of(load_dataset(data / "domains" / name), "all") for name in DOMAINS}
    unknown = unlabelled(find_images(data / "ood", recursive=True))
    return Materials(
        backbone,
        dataset,
        feature_source(dataset.test, backbone, features),
        tuple(feature_source(half, backbone, features) for half in halves(dataset)),
        {name: feature_source(images, backbone, features) for name, images in domains.items()},
        feature_source(unknown, backbone, features),
    )


def _untrained(learner: Learner, materials: Materials) -> Trial:
    base, _ = halves(materials.dataset)
    return Trial(None, _measure(learner, learner.with_class_names(base.class_names), materials))


def _trained(method: str, options: dict, materials: Materials, out: Path) -> Trial:
    """Train on all classes and on the base classes with one seed, and test."""
    runs, learners = {}, {}
    for classes in ("all", "base"):
        config = configure(
            method,
            data=out / "data",
            backbone="demo",
            cache_dir=out / "cache",
            classes=classes,
            out=out / "runs" / f"{method}-{classes}-seed{options['seed']}",
            **options,
        )
        runs[classes] = train_run(config, backbone=materials.backbone).run
        learners[classes] = load_run(runs[classes].path, backbone=materials.backbone)
    epochs = epoch_metrics(runs["all"])
    cost = {"seconds": sum(epoch.seconds for epoch in epochs)}
    if epochs[0].peak_memory_bytes is not None:
        cost["memory"] = max(epoch.peak_memory_bytes for epoch in epochs)
    return Trial(runs["all"], _measure(learners["all"], learners["base"], materials) | cost)


def _measure(on_all: Learner, on_base: Learner, materials: Materials) -> dict[str, float]:
    """Test a learner of all classes, and one of the base classes."""
    _, new = halves(materials.dataset)
    generalisation = base_to_new(on_base, *materials.halves, new.class_names)
    detection = ood_detection(on_all, materials.test, materials.unknown)
    return {
        "accuracy": evaluate_accuracy(on_all, materials.test).top1,
        "base": generalisation.base.top1,
        "new": generalisation.new.top1,
        **{name: evaluate_accuracy(on_all, source).top1 for name, source in materials.domains.items()},
        "fpr95": detection.fpr95,
        "auroc": detection.auroc,
    }


def halves(dataset: Dataset) -> tuple[LabelledImages, LabelledImages]:
    """Test images of the base and of the new classes."""
    return select_classes(dataset.test, "base"), select_classes(dataset.test, "new")

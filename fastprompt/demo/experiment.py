"""The demo: zero-shot CLIP, CoOp and GalLoP on the built-in scenes, over seeds."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from fastprompt.backbone import Backbone, load_backbone
from fastprompt.data import Dataset, find_images, load_dataset
from fastprompt.demo.scenes import DOMAINS, write_dataset
from fastprompt.evaluation import evaluate_accuracy, ood_detection
from fastprompt.experiment.config import FeatureConfig, TrainConfig, TrainCoOp, TrainGalLoP, TrainZeroShot
from fastprompt.experiment.sources import feature_source, split_of, unlabelled
from fastprompt.experiment.train import EVALUATION, train_run
from fastprompt.experiment.use import load_run
from fastprompt.training import FeatureSource, RunFolder, epoch_metrics

SEEDS = (1, 2, 3)
SHOTS = 16

# As published but for the epochs, of which a small model on clean pictures needs fewer, and GalLoP's k, which is scaled
# to the 8 x 8 patches: an object covers about 2 x 2 of them.
EPOCHS = 12
RECIPES: tuple[tuple[type[TrainConfig], dict], ...] = (
    (TrainZeroShot, {}),
    (TrainCoOp, {"epochs": EPOCHS}),
    (TrainGalLoP, {"epochs": EPOCHS, "k": (2, 3, 5, 7)}),
)


@dataclass(frozen=True)
class Materials:
    """What every method is tested on.

    Attributes:
        backbone: the built-in model.
        dataset: the scenes; its test images are ``test``.
        test: features of the test images.
        domains: features of the same classes in shifted renderings, by name.
        unknown: features of objects that are in no class.
    """

    backbone: Backbone
    dataset: Dataset
    test: FeatureSource
    domains: dict[str, FeatureSource]
    unknown: FeatureSource


@dataclass(frozen=True)
class Trial:
    """What one method did with one seed; accuracies and rates are fractions.

    Attributes:
        run: trained on all classes.
        measures: "accuracy", "base", "new", one for each domain, "fpr95", "auroc", and, where something was trained,
            "seconds" and "memory" (bytes) of training on all classes.
    """

    run: RunFolder
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
    features = FeatureConfig(cache_dir=out / "cache")
    materials = _prepare(_render_once(out / "data"), features)
    trials = {
        recipe.method: [
            _trial(recipe, {**options, "seed": seed, "shots": SHOTS}, materials, out)
            for seed in (SEEDS if recipe is not TrainZeroShot else SEEDS[:1])  # nothing in it is random
        ]
        for recipe, options in RECIPES
    }
    return DemoResult(materials, trials, time.perf_counter() - started)


def _render_once(folder: Path) -> Path:
    """The scenes in ``folder``, rendered under another name first, so that the folder is whole or absent."""
    if not folder.is_dir():
        write_dataset(unfinished := folder.with_suffix(".unfinished"))
        unfinished.rename(folder)
    return folder


def _prepare(data: Path, features: FeatureConfig) -> Materials:
    backbone = load_backbone("demo")
    dataset = load_dataset(data)
    domains = {name: split_of(load_dataset(data / "domains" / name), "all") for name in DOMAINS}
    unknown = unlabelled(find_images(data / "ood", recursive=True))
    return Materials(
        backbone,
        dataset,
        feature_source(dataset.test, backbone, features),
        {name: feature_source(images, backbone, features) for name, images in domains.items()},
        feature_source(unknown, backbone, features),
    )


def _trial(recipe: type[TrainConfig], options: dict, materials: Materials, out: Path) -> Trial:
    """Train on all classes and on the base classes with one seed, and test."""
    runs = {}
    for classes in ("all", "base"):
        config = recipe(
            data=out / "data",
            backbone="demo",
            cache_dir=out / "cache",
            classes=classes,
            out=out / "runs" / f"{recipe.method}-{classes}-seed{options['seed']}",
            **options,
        )
        runs[classes] = train_run(config, backbone=materials.backbone).run
    learner = load_run(runs["all"].path, backbone=materials.backbone)
    base_to_new = runs["base"].metrics(EVALUATION)[-1]["results"][recipe.method]
    detection = ood_detection(learner, materials.test, materials.unknown)
    measures = {
        "accuracy": runs["all"].metrics(EVALUATION)[-1]["results"][recipe.method]["accuracy"],
        "base": base_to_new["base"],
        "new": base_to_new["new"],
        **{name: evaluate_accuracy(learner, source).top1 for name, source in materials.domains.items()},
        "fpr95": detection.fpr95,
        "auroc": detection.auroc,
    }
    if epochs := epoch_metrics(runs["all"]):
        measures["seconds"] = sum(epoch.seconds for epoch in epochs)
        measures["memory"] = max(epoch.peak_memory_bytes or 0 for epoch in epochs)
    return Trial(runs["all"], measures)

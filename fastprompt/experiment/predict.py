"""Naming what is on images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fastprompt.errors import InputError
from fastprompt.experiment.config import PredictConfig
from fastprompt.experiment.runs import load_run
from fastprompt.experiment.sources import features_of, images_in


def predict_images(config: PredictConfig) -> Iterator[tuple[Path, list[tuple[str, float]]]]:
    """The most probable classes of every image, with their probabilities, best first; each as soon as it is known."""
    if not config.images:
        raise InputError("images: expected image files or folders, got none")
    if config.top < 1:
        raise InputError(f"top: expected at least 1, got {config.top}")
    paths = [path for given in config.images for path in (images_in(given) if given.is_dir() else (given,))]
    learner = load_run(config.run, device=config.device, class_names=config.class_names)
    for path in paths:
        probabilities = learner.predict(features_of(path, learner.backbone))[0]
        best = probabilities.topk(min(config.top, len(learner.class_names)))
        classes = [learner.class_names[index] for index in best.indices.tolist()]
        yield path, list(zip(classes, best.values.tolist(), strict=True))

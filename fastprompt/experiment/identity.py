"""Which data a run was made from: names and contents, so that the same command on changed data is noticed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from fastprompt.data import Dataset, LabelledImages, hash_files
from fastprompt.experiment.configure import Experiment


def data_identity(
    config: Experiment, dataset: Dataset, train: LabelledImages, *, progress: bool = True
) -> dict[str, Any]:
    """What decides a result beside the configuration.

    Args:
        config: names the files that the learner reads, such as descriptions of classes.
        dataset: gives the class names and the test images.
        train: the images that are trained on; not looked at where nothing is.
        progress: whether to show bars.

    Returns:
        Class names in their order, and a digest of the contents and labels of the images and of the files.

    Raises:
        InputError: a file cannot be read.
    """
    identity: dict[str, Any] = {"class_names": list(dataset.train.class_names)}
    if config.training is not None:
        identity["training_images"] = _digest(train, progress)
    identity["test_images"] = _digest(dataset.test, progress)
    for name, file in config.files.items():
        identity[f"{name}_contents"] = file_identity(file, name)
    return identity


def file_identity(file: Path, what: str) -> str:
    """Digest the contents of a file: "sha256 0123456789abcdef".

    Args:
        file: to be read.
        what: how messages call it, such as "checkpoint".

    Raises:
        InputError: it is no regular file, or cannot be read.
    """
    return _short(hash_files([file], what=what, progress=False)[0])


def _digest(images: LabelledImages, progress: bool) -> str:
    """Such as "16 images, sha256 0123456789abcdef", of contents and labels in their order, not of the files' names."""
    lines = zip(hash_files(images.paths, progress=progress), images.labels, strict=True)
    digest = hashlib.sha256("".join(f"{content} {label}\n" for content, label in lines).encode())
    return f"{len(images)} images, {_short(digest.hexdigest())}"


def _short(digest: str) -> str:
    return f"sha256 {digest[:16]}"

"""Choosing what to learn from: K images a class, and the base or new half of the classes."""

import logging
import random
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from fastprompt.data.images import LabelledImages
from fastprompt.errors import InputError

_log = logging.getLogger(__name__)

Sampler = Literal["exact", "published", "stratified"]


def few_shot(
    images: LabelledImages,
    shots: int | None,
    seed: int,
    sampler: Sampler = "exact",
) -> LabelledImages:
    """Draw a few labelled images; the draw depends on ``images`` and ``seed`` only, never on a global RNG.

    ``"exact"`` takes exactly K images of every class, and all of a class that has fewer, as the CoOp family does. The
    images of K shots are among those of K+1 shots of the same seed, so curves over the shots are nested, and a class
    keeps its images whatever the other classes are. They are not the images that the published code draws.

    ``"published"`` takes as many, and the very images that CoOp's code (``generate_fewshot_dataset`` of Dassl) takes
    for the same seed, if ``images`` are those of its split file in the file's order; in its order, too. Draws are not
    nested then. For base-to-new, draw from all classes, then select, as that code does.

    ``"stratified"`` takes K * C images (all if there are no more) in the proportions of the classes, as GalLoP's code
    does: frequent classes get more than K, rare ones fewer, perhaps none. Shares are rounded by largest remainder, ties
    at random. It reproduces the proportions, not the very images that scikit-learn's ``StratifiedShuffleSplit`` draws.

    Args:
        images: Usually the training split.
        shots: K; None or 0 for all images.
        seed: At least 0.
        sampler: "exact", "published" or "stratified".

    Returns:
        The chosen images, grouped by class, with all C class names.

    Raises:
        InputError: If ``shots`` or ``seed`` is negative, or the sampler is unknown.
    """
    _check_draw(shots, seed, sampler)
    if not shots:
        return images
    if sampler == "published":
        return images.subset(_published(images.labels, shots, seed))
    labels = np.asarray(images.labels)
    available = np.bincount(labels, minlength=len(images.class_names))  # (C,)
    if sampler == "exact":
        wanted = np.minimum(available, shots)
    else:
        wanted = _proportional(available, shots * len(available), np.random.default_rng(seed))
    if not wanted.all():
        _log.warning("%d of %d classes have no image among the few shots", (wanted == 0).sum(), len(wanted))
    chosen: list[int] = []
    for label, count in enumerate(wanted):
        # A stream for each class: a class keeps its images whatever the other classes are.
        order = np.random.default_rng([seed, label]).permutation(np.flatnonzero(labels == label))
        chosen.extend(np.sort(order[:count]).tolist())
    return images.subset(chosen)


def select_classes(images: LabelledImages, which: Literal["all", "base", "new"]) -> LabelledImages:
    """Keep all classes, the base classes (the first ceil(C/2) labels) or the new ones (the rest): CoCoOp's protocol.

    Labels and class names of the result start from 0.

    Raises:
        InputError: If ``which`` is unknown, or the chosen classes have no image.
    """
    if which not in ("all", "base", "new"):
        raise InputError(f"classes: expected 'all', 'base' or 'new', got {which!r}")
    if which == "all":
        return images
    half = -(-len(images.class_names) // 2)
    kept = range(half) if which == "base" else range(half, len(images.class_names))
    chosen = [i for i, label in enumerate(images.labels) if label in kept]
    if not chosen:
        raise InputError(f"the {which} half of the {len(images.class_names)} classes has no image")
    return LabelledImages(
        paths=tuple(images.paths[i] for i in chosen),
        labels=tuple(images.labels[i] - kept.start for i in chosen),
        class_names=images.class_names[kept.start : kept.stop],
    )


def _check_draw(shots: int | None, seed: int, sampler: str) -> None:
    if shots is not None and shots < 0:
        raise InputError(f"shots: expected at least 1, or 0 for all images, got {shots}")
    if seed < 0:
        raise InputError(f"seed: expected at least 0, got {seed}")
    if sampler not in get_args(Sampler):
        raise InputError(f"sampler: expected one of {get_args(Sampler)}, got {sampler!r}")


def _published(labels: Sequence[int], shots: int, seed: int) -> list[int]:
    """One stream of Python's own generator for all classes, in the order in which they first occur."""
    by_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        by_class.setdefault(label, []).append(index)
    stream = random.Random(seed)
    return [
        index
        for indices in by_class.values()
        for index in (stream.sample(indices, shots) if len(indices) >= shots else indices)
    ]


def _proportional(available: np.ndarray, total: int, rng: np.random.Generator) -> np.ndarray:
    """Share ``total`` among the classes in proportion to ``available`` (C,), by largest remainder, ties at random."""
    images = int(available.sum())
    if total >= images:
        return available
    share, remainder = np.divmod(available * total, images)
    by_remainder = np.lexsort((rng.random(len(available)), -remainder))
    share[by_remainder[: total - share.sum()]] += 1
    return share

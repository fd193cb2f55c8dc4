"""Labelled images as callers have them: features in memory, torch's data sets and loaders. All become sources."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, default_collate

from fastprompt.errors import InputError
from fastprompt.progress import progress_bar, say_line
from fastprompt.sources.features import ImageFeatures, Reads, join_features
from fastprompt.sources.source import CachedSource, FeatureSource, ImageEncoder, class_indices

IMAGES_AT_ONCE = 32  # of a data set; a loader has a batch size of its own

Images = FeatureSource | tuple[ImageFeatures, Any] | Dataset | DataLoader


class Reader(Protocol):
    """What `as_source` needs of a learner."""

    backbone: ImageEncoder
    reads: Reads


def as_source(
    images: Images, learner: Reader, *, what: str = "images", progress: bool = True, reads: Reads | None = None
) -> FeatureSource:
    """Make a source of labelled images, which is what training and tests read; features are computed once and kept.

    Args:
        images: a source, which is given back; ``(ImageFeatures, labels)`` with labels (n,); or a torch ``Dataset`` or
            ``DataLoader`` of (image, label) with images (3, S, S), as ``image_transform`` makes them. Those are read
            once, in the order of the data set: a random transform gives every image one view for good, and shuffling
            is left to ``fit``, which draws the order from its seed. Their features stay in memory.
        learner: its backbone encodes the images, of which is kept what it reads.
        what: what the images are, for the bar: "training images", for instance.
        progress: whether to show a bar.
        reads: what is kept of images that are encoded here; what the learner's ``forward`` reads by default.

    Raises:
        InputError: something else, no image, or images or labels that are not as above.
    """
    if hasattr(images, "labels") and hasattr(images, "batch"):
        return images
    if isinstance(images, tuple | list) and len(images) == 2 and isinstance(images[0], ImageFeatures):
        return CachedSource(*images)
    if isinstance(images, Dataset | DataLoader):
        return _encoded(_in_order(images), learner, learner.reads if reads is None else reads, what, progress)
    raise InputError(
        f"{what}: expected feature_source(images, backbone), (ImageFeatures, labels), or a torch Dataset or DataLoader "
        f"of (image, label), got {_kind(images)}"
    )


def _in_order(images: Dataset | DataLoader) -> DataLoader:
    """A loader of all images in the order of the data set."""
    if isinstance(images, DataLoader) and not isinstance(images.sampler, RandomSampler):
        return images
    if not isinstance(images, DataLoader):
        return DataLoader(images, batch_size=IMAGES_AT_ONCE)
    options = {"batch_size": images.batch_size, "num_workers": images.num_workers, "collate_fn": images.collate_fn}
    return DataLoader(images.dataset, **options)


def _encoded(loader: DataLoader, learner: Reader, reads: Reads, what: str, progress: bool) -> CachedSource:
    features, labels = [], []
    for pixels, of_pixels in _batches(loader, what, progress):
        features.append(learner.backbone.encode_images(pixels).keep(reads).to("cpu"))
        labels.append(of_pixels)
    if not features:
        raise InputError(f"{what}: expected at least one image, got an empty {_kind(loader.dataset)}")
    return CachedSource(join_features(features), torch.cat(labels))


def _batches(loader: DataLoader, what: str, progress: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (b, 3, S, S) and labels (b,) of a loader, checked."""
    if hasattr(loader.dataset, "__len__"):
        if not len(loader.dataset):
            return
        if loader.collate_fn is default_collate:
            _check_item(loader.dataset[0], what)
    with progress_bar(what=f"encoding {what}", shown=progress, unit="image") as bar:
        say_line(f"encoding {what}", bar, shown=progress)
        for batch in loader:
            if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[0], Tensor):
                raise InputError(f"{what}: expected batches of (images, labels), got {_kind(batch)}")
            yield batch[0], class_indices(batch[1])
            bar.update(len(batch[0]))


def _check_item(item: Any, what: str) -> None:
    """Raise ``InputError`` unless an item of a data set is (image, label), before torch tries to stack such items."""
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise InputError(f"{what}: expected items (image, label), got {_kind(item)}")
    if not isinstance(item[0], Tensor):
        raise InputError(
            f"{what}: expected images as tensors (3, S, S), got {_kind(item[0])}: give the data set "
            "transform=fastprompt.image_transform(backbone)"
        )


def _kind(value: object) -> str:
    """What something is, for a sentence: its type, with the shape of a tensor and the length of a tuple."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__

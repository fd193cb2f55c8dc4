"""From labelled images and a backbone to features."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor, no_grad

from fastprompt.backbone import Backbone
from fastprompt.data import (
    Dataset,
    FeatureCache,
    ImageTransform,
    LabelledImages,
    default_cache_dir,
    read_batch,
)
from fastprompt.errors import InputError
from fastprompt.experiment.config import FeatureConfig
from fastprompt.training import CachedSource, FeatureSource, ImageSource


def image_transform(backbone: Backbone, *, augment: bool = False) -> ImageTransform:
    """The transform that the backbone was trained with, or its randomly cropping and flipping variant."""
    return ImageTransform(
        backbone.image_size,
        backbone.mean,
        backbone.std,
        backbone.interpolation,
        resize_mode=backbone.resize_mode,
        augment=augment,
    )


def feature_source(
    images: LabelledImages,
    backbone: Backbone,
    config: FeatureConfig,
    *,
    augment: bool = False,
    progress: bool = True,
) -> FeatureSource:
    """Features of images: from the disk cache, which is filled first, or computed batch by batch.

    Args:
        images: what to encode.
        backbone: encodes them.
        config: whether and where features are kept.
        augment: random crops and flips; such features are never cached.
        progress: whether to show bars.
    """
    transform = image_transform(backbone, augment=augment)
    if augment or not config.cache:
        read, plain = (partial(read_batch, transform=image_transform(backbone, augment=a)) for a in (augment, False))
        return ImageSource(
            images.paths, images.labels, read=read, read_plain=plain, backbone=backbone, at_once=config.image_batch
        )

    @no_grad()
    def encode(batch: Tensor) -> dict[str, Tensor]:
        features = backbone.encode_images(batch)
        return {"pooled": features.pooled, "patches": features.patches}

    key = f"{backbone.fingerprint} {backbone.dtype} {transform.description}"
    cache = FeatureCache(config.cache_dir or default_cache_dir(), key)
    rows = cache.load(images.paths, encode, transform, batch_size=config.image_batch, progress=progress)
    return CachedSource(rows, images.labels)


def split_of(dataset: Dataset, split: str) -> LabelledImages:
    """The images of one split, or of all splits together.

    Raises:
        InputError: the data set has no such split.
    """
    splits = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    if split != "all":
        if splits[split] is None:
            raise InputError(f"split: data set {dataset.name} has no split {split!r}")
        return splits[split]
    present = [images for images in splits.values() if images is not None]
    paths = tuple(path for images in present for path in images.paths)
    labels = tuple(label for images in present for label in images.labels)
    return LabelledImages(paths, labels, dataset.train.class_names)


def unlabelled(paths: tuple[Path, ...]) -> LabelledImages:
    """Images of no known class, for sources whose labels are not used."""
    return LabelledImages(paths, (0,) * len(paths), ("unknown",))

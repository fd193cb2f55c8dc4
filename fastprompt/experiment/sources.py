"""From labelled images and a backbone to features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastprompt.backbone import Backbone, load_backbone
from fastprompt.data import (
    Dataset,
    FeatureCache,
    ImageTransform,
    LabelledImages,
    default_cache_dir,
    find_images,
    load_image,
    read_batch,
)
from fastprompt.errors import InputError
from fastprompt.sources import PATCHES, CachedSource, FeatureSource, ImageFeatures, ImageSource, ReadImages, Reads

if TYPE_CHECKING:
    from fastprompt.experiment.config import BackboneConfig, FeatureConfig, PlaceConfig


def image_transform(backbone: Backbone) -> ImageTransform:
    """The transform that the backbone was trained with."""
    return ImageTransform(
        backbone.image_size,
        backbone.mean,
        backbone.std,
        backbone.interpolation,
        resize_mode=backbone.resize_mode,
    )


def open_backbone(config: BackboneConfig, place: PlaceConfig) -> Backbone:
    """Load the backbone that a configuration names."""
    chosen = config.absolute()
    name, patches = chosen.pop("backbone"), chosen.pop("patch_features")
    return load_backbone(name, patches=patches, **chosen, **place.loading())


@torch.no_grad()
def features_of(path: Path, backbone: Backbone) -> ImageFeatures:
    """Features of one image file, B = 1."""
    pixels: Tensor = image_transform(backbone)(load_image(path))
    return backbone.encode_images(pixels[None])


def images_in(folder: Path, *, recursive: bool = False) -> tuple[Path, ...]:
    """The image files of a folder, of which there must be one."""
    if not (paths := find_images(folder, recursive=recursive)):
        raise InputError(f"image folder {folder}: expected at least one image, found none")
    return paths


def encode(images: Tensor, backbone: Backbone) -> dict[str, Tensor]:
    """The named rows of a feature cache for images (B, 3, S, S)."""
    return backbone.encode_images(images).tensors


def plain_reader(backbone: Backbone) -> ReadImages:
    """Reads images as the backbone was trained with them; nothing is random."""
    transform = image_transform(backbone)

    def read(paths: Sequence[Path], *, generator: torch.Generator | None) -> Tensor:
        return read_batch(paths, transform)

    return read


def feature_source(
    images: LabelledImages,
    backbone: Backbone,
    config: FeatureConfig | None = None,
    *,
    reads: Reads = PATCHES,
    progress: bool = True,
    what: str = "images",
) -> FeatureSource:
    """Features of images: from the disk cache, which is filled first, or computed batch by batch.

    Args:
        images: what to encode.
        backbone: encodes them.
        config: whether and where features are kept; in the default cache by default.
        reads: what the cache must hold of every image; what the learners read is enough.
        progress: whether to show bars.
        what: what the images are, for the bar: "test images", for instance.
    """
    from fastprompt.experiment.config import FeatureConfig  # brings tyro, which crops and steps do without

    config = config or FeatureConfig()
    if not config.cache:
        read = plain_reader(backbone)
        given = {"read": read, "backbone": backbone, "at_once": config.image_batch, "class_names": images.class_names}
        return ImageSource(images.paths, images.labels, **given)
    transform = image_transform(backbone)
    read = partial(read_batch, transform=transform)
    key = f"{backbone.fingerprint} {backbone.dtype} {transform.description}"
    cache = FeatureCache(config.cache_dir or default_cache_dir(), key)
    options = {"batch_size": config.image_batch, "progress": progress, "what": what}
    rows = cache.load(images.paths, partial(encode, backbone=backbone), read, reads, **options)
    return CachedSource(rows, images.labels, backbone.fingerprint, images.class_names)


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

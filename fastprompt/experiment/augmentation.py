"""Training on random crops: drawn anew in every epoch, or a fixed number of views that are encoded once."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from fastprompt_kernels import resized_crop
from torch import Tensor

from fastprompt.backbone import Backbone
from fastprompt.data import (
    DecodedImages,
    FeatureCache,
    LabelledImages,
    RandomCrops,
    decode_images,
    decoded_bytes,
    default_cache_dir,
    draw_crops,
    seeded_crops,
)
from fastprompt.errors import InputError
from fastprompt.experiment.sources import encode, feature_source, image_transform, plain_reader
from fastprompt.sources import PATCHES, FeatureSource, ImageSource, Reads, ViewSource

if TYPE_CHECKING:
    from fastprompt.experiment.configure import Experiment

log = logging.getLogger(__name__)


def training_source(
    images: LabelledImages, backbone: Backbone, config: Experiment, *, reads: Reads = PATCHES, progress: bool = True
) -> FeatureSource:
    """Features of the training images: with random crops and flips where ``config`` asks for them.

    Args:
        images: what to train on.
        backbone: encodes them.
        config: of a method that learns: which augmentation, and what may be kept.
        reads: what the learner reads of an image.
        progress: whether to show bars.

    Raises:
        InputError: an image cannot be read.
    """
    asked, kept = config.training, config.features
    if not asked.augment:
        return feature_source(images, backbone, kept, reads=reads, progress=progress, what="training images")
    read = KeptImages(images.paths, backbone.device, config.runtime.image_memory)
    if asked.views:
        return _view_source(images, read, backbone, config, reads, progress)
    crops = partial(read_crops, read=read, backbone=backbone)
    plain = plain_reader(backbone)
    given = {"read": crops, "read_plain": plain, "backbone": backbone, "at_once": kept.image_batch}
    return ImageSource(images.paths, images.labels, class_names=images.class_names, **given)


class KeptImages:
    """Reads images as levels on the backbone's device: decoded once and kept, or anew each time if they are too many.

    Args:
        paths: all images that will be asked for.
        device: where they are kept.
        memory: what they may take, in GB.
    """

    def __init__(self, paths: Sequence[Path], device: torch.device, memory: float) -> None:
        self.device = device
        self.rows = {path: row for row, path in enumerate(dict.fromkeys(paths))}
        self.kept: DecodedImages | None = None
        size = decoded_bytes(tuple(self.rows)) / 1e9
        self.fits = size <= memory
        if not self.fits:
            log.warning(
                "augmentation: the %d training images take %.1f GB decoded, more than the %g GB of --image-memory, so "
                "they are decoded again in every epoch",
                *(len(self.rows), size, memory),
            )

    def __call__(self, paths: Sequence[Path]) -> DecodedImages:
        """Some of the images, in the order of their paths; ``InputError`` names one that cannot be read."""
        if not self.fits:
            return decode_images(paths).to(self.device)
        if self.kept is None:
            self.kept = decode_images(tuple(self.rows)).to(self.device)
        return self.kept[torch.tensor([self.rows[path] for path in paths])]


def read_crops(
    paths: Sequence[Path], *, generator: torch.Generator | None, read: KeptImages, backbone: Backbone
) -> Tensor:
    """Random crops (b, 3, S, S) of images, as the backbone takes them, on its device.

    Args:
        paths: b images.
        generator: decides the crops and flips.
        read: gives the levels.
        backbone: gives size, normalisation, interpolation and precision.

    Raises:
        InputError: there is no generator, or an image cannot be read.
    """
    if generator is None:
        raise InputError("random crops need a torch.Generator, got None")
    images = read(paths)
    return cut(images, draw_crops(images.places[:, 1:], generator), backbone)


def cut(images: DecodedImages, crops: RandomCrops, backbone: Backbone) -> Tensor:
    """The crops as images (b, 3, S, S) that the backbone takes."""
    return resized_crop(
        images.pixels,
        images.places,
        crops.boxes,
        backbone.image_size,
        flips=crops.flips,
        mean=backbone.mean,
        std=backbone.std,
        interpolation=backbone.interpolation,
        dtype=backbone.dtype,
    )


def _view_source(
    images: LabelledImages, read: KeptImages, backbone: Backbone, config: Experiment, reads: Reads, progress: bool
) -> ViewSource:
    """Every view has a feature cache of its own, kept like that of images without augmentation."""
    views, count, kept = [], config.training.views, config.features
    transform = image_transform(backbone).description
    for view in range(count):
        key = f"{backbone.fingerprint} {backbone.dtype} random-resized-crop+flip view {view} before {transform}"
        cache = FeatureCache(kept.cache_dir or default_cache_dir(), key)
        crop = partial(_crop_view, view=view, backbone=backbone)
        features = cache.load(
            images.paths,
            lambda batch, crop=crop: encode(crop(batch), backbone),
            read,
            reads,
            batch_size=kept.image_batch,
            progress=progress,
            what=f"training images, view {view + 1} of {count}",
        )
        views.append(features)
    plain = partial(feature_source, images, backbone, kept, reads=reads, progress=progress, what="training images")
    return ViewSource(views, images.labels, plain, backbone.fingerprint, images.class_names)


def _crop_view(images: DecodedImages, view: int, backbone: Backbone) -> Tensor:
    """One view of each image. As the rows of a cache must, it depends on the levels and the view's number alone."""
    seeds = []
    for start, height, width in images.places.tolist():
        levels = images.pixels[start : start + 3 * height * width].cpu().numpy()
        seeds.append(int(np.random.SeedSequence([view, zlib.crc32(levels)]).generate_state(1)[0]))
    return cut(images, seeded_crops(images.places[:, 1:], seeds), backbone)

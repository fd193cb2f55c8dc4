"""Where training batches come from: cached features, or images that are read and encoded on the fly."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

import torch
from torch import Generator, Tensor

from fastprompt.errors import InputError
from fastprompt.sources.features import PATCHES, ImageFeatures, Reads, join_features

PLAIN_BATCH = 256  # cached images that are read at once


class FeatureSource(Protocol):
    """Labelled images as features, in any order.

    Attributes:
        labels: (n,) int64, an index into the learner's class names for every image.
        class_names: what the labels mean; None where that is not known.
        origin: what the last bits of the features depend on, beside images and backbone; a resumed run compares it.
    """

    labels: Tensor
    class_names: tuple[str, ...] | None
    origin: str

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor, generator: Generator | None = None, reads: Reads = PATCHES) -> ImageFeatures:
        """Features of the images at `indices` (b,), in that order.

        Args:
            indices: (b,).
            generator: Makes random transforms repeatable.
            reads: Names of the features that are asked for: others are not loaded, nor those that the source lacks.
        """
        ...

    def plain_batches(self, reads: Reads = PATCHES) -> Iterator[tuple[ImageFeatures, Tensor]]:
        """Features and labels of all images once, in order and without random transforms."""
        ...


class FeatureRows(Protocol):
    """What `CachedSource` reads from: named tensors with one row an image."""

    def __len__(self) -> int: ...

    def rows(self, indices: Tensor, names: Reads) -> Mapping[str, Tensor]:
        """The rows at `indices` of the tensors among `names` that there are: "pooled" (b, D), "patches" (b, P, W)."""
        ...


class ImageEncoder(Protocol):
    """What `ImageSource` needs of a backbone."""

    def encode_images(self, images: Tensor) -> ImageFeatures:
        """Features of images (B, 3, S, S), which may lie on another device than the weights."""
        ...


class ReadImages(Protocol):
    """What `ImageSource` reads files with."""

    def __call__(self, paths: Sequence[Path], *, generator: Generator | None) -> Tensor:
        """Transformed images (b, 3, S, S); a random transform draws from `generator` alone."""
        ...


def class_indices(labels: Sequence[int] | Tensor) -> Tensor:
    """Labels as a tensor (n,) int64 on the CPU; ``InputError`` where they are no whole numbers, one an image."""
    expected = "labels: expected integers (n,) that index the learner's class names"
    try:
        indices = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{expected}, got {labels!r:.80}") from error
    if indices.dim() != 1 or (len(indices) and (indices.is_floating_point() or indices.is_complex())):
        raise InputError(f"{expected}, got shape {tuple(indices.shape)} of {indices.dtype}")
    return indices.to("cpu", torch.int64)


def check_labels(source: FeatureSource, class_names: Sequence[str], what: str) -> None:
    """Raise ``InputError`` unless every label names a class of a learner, and the source's own names are the same."""
    if not len(source):
        raise InputError(f"{what}: expected at least one, got none")
    low, high = int(source.labels.min()), int(source.labels.max())
    if low < 0 or high >= len(class_names):
        raise InputError(
            f"labels of {what}: expected 0 to {len(class_names) - 1}, one for each class name of the learner, got "
            f"{low} to {high}"
        )
    names = class_names if source.class_names is None else source.class_names
    for number, (ours, theirs) in enumerate(zip_longest(class_names, names)):
        if ours != theirs:
            raise InputError(f"class {number} of {what}: expected {ours!r} as in the learner, got {theirs!r}")


class CachedSource:
    """Features that were computed before, for a deterministic transform.

    Args:
        features: One row an image: features in memory, or for instance the data room's cached features.
        labels: (n,) class indices in the order of the rows.
        fingerprint: Of the backbone that made rows of a cache, which do not say it; see `ImageFeatures`.
        class_names: What the labels mean, where that is known.

    Raises:
        InputError: Neither kind of features, labels that are no integers, or not as many labels as rows.
    """

    def __init__(
        self,
        features: ImageFeatures | FeatureRows,
        labels: Sequence[int] | Tensor,
        fingerprint: str | None = None,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        if not isinstance(features, ImageFeatures) and not hasattr(features, "rows"):
            raise InputError(
                "features: expected ImageFeatures(pooled (n, D), patches (n, P, W)), as backbone.encode_images makes "
                f"them, or rows of a feature cache, got {type(features).__name__}"
            )
        self.features, self.fingerprint, self.class_names = features, fingerprint, class_names
        self.labels = class_indices(labels)
        if len(features) != len(self.labels):
            raise InputError(f"labels must be as many as the {len(features)} cached images, not {len(self.labels)}")

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def origin(self) -> str:
        """Says which features these are: by the checksum of the cache, or of the pooled ones in memory."""
        if isinstance(self.features, ImageFeatures):
            pooled = self.features.pooled.detach().cpu().contiguous()
            return f"features in memory with checksum {zlib.crc32(pooled.view(-1).view(torch.uint8).numpy()):08x}"
        checksum = getattr(self.features, "checksum", None)
        return "rows without a checksum" if checksum is None else f"cached features with checksum {checksum:08x}"

    def batch(self, indices: Tensor, generator: Generator | None = None, reads: Reads = PATCHES) -> ImageFeatures:
        """Features of the images at `indices` (b,); nothing here is random."""
        if isinstance(self.features, ImageFeatures):
            return self.features.keep(reads)[indices]
        return ImageFeatures(**self.features.rows(indices, reads), fingerprint=self.fingerprint)

    def plain_batches(self, reads: Reads = PATCHES) -> Iterator[tuple[ImageFeatures, Tensor]]:
        """Features and labels of all images once, in order."""
        for indices in torch.arange(len(self)).split(PLAIN_BATCH):
            yield self.batch(indices, reads=reads), self.labels[indices]


class ViewSource:
    """Features of several random views of every image that were computed before; a batch takes one view of each.

    Args:
        views: One row an image each, in the same order.
        labels: (n,) class indices in the order of the rows.
        plain: Gives the images without random transforms, for `plain_batches`; called only where those are asked for.
        fingerprint: Of the backbone that made the views.
        class_names: What the labels mean, where that is known.

    Raises:
        InputError: There is no view, or not as many labels as rows.
    """

    def __init__(
        self,
        views: Sequence[FeatureRows],
        labels: Sequence[int] | Tensor,
        plain: Callable[[], FeatureSource],
        fingerprint: str | None = None,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        if not views:
            raise InputError("views: expected at least one view of every image, got none")
        self.views = [CachedSource(view, labels, fingerprint) for view in views]
        self.labels, self.class_names = self.views[0].labels, class_names
        self.plain = plain

    @cached_property
    def origin(self) -> str:
        """Says which features these are, view by view."""
        return "; ".join(view.origin for view in self.views)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, generator: Generator | None = None, reads: Reads = PATCHES) -> ImageFeatures:
        """Features of the images at `indices` (b,), each in the view that `generator` draws for it."""
        if generator is None:
            raise InputError("random views need a torch.Generator, got None")
        drawn = torch.randint(len(self.views), indices.shape, generator=generator)
        by_view = drawn.argsort(stable=True)
        parts = [view.batch(indices[drawn == number], reads=reads) for number, view in enumerate(self.views)]
        place = by_view.argsort()  # of every image among the parts
        return join_features(parts)[place]

    def plain_batches(self, reads: Reads = PATCHES) -> Iterator[tuple[ImageFeatures, Tensor]]:
        """Features and labels of all images once, in order and without a random view."""
        return self.plain().plain_batches(reads)


class ImageSource:
    """Images that are read, transformed and encoded for every batch, as random transforms need.

    Args:
        paths: Image files.
        labels: (n,) class indices, one a file.
        read: Files and a generator to transformed images (b, 3, S, S), for instance
            `functools.partial(fastprompt.data.read_batch, transform=transform)`.
        backbone: Encodes the images.
        read_plain: The same without random transforms, for `plain_batches`; `read` by default.
        at_once: Images that are read and encoded at a time, however many are asked for.
        class_names: What the labels mean, where that is known.

    Raises:
        InputError: There are not as many labels as paths, or `at_once` is below 1.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Sequence[int] | Tensor,
        *,
        read: ReadImages,
        backbone: ImageEncoder,
        read_plain: ReadImages | None = None,
        at_once: int = 32,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        if at_once < 1:
            raise InputError(f"image batch: expected at least 1 image, got {at_once}")
        self.paths = tuple(paths)
        self.labels, self.class_names = class_indices(labels), class_names
        self.read, self.read_plain = read, read_plain or read
        self.backbone = backbone
        self.at_once = at_once
        self.origin = f"images encoded {at_once} at a time"
        if len(self.paths) != len(self.labels):
            raise InputError(f"labels must be as many as the {len(self.paths)} image paths, not {len(self.labels)}")

    def __len__(self) -> int:
        return len(self.paths)

    def batch(self, indices: Tensor, generator: Generator | None = None, reads: Reads = PATCHES) -> ImageFeatures:
        """Features of the images at `indices` (b,), transformed anew with random numbers from `generator`."""
        encoded = [self._encode(self.read, some, generator, reads) for some in indices.split(self.at_once)]
        return join_features(encoded)

    def plain_batches(self, reads: Reads = PATCHES) -> Iterator[tuple[ImageFeatures, Tensor]]:
        """Features and labels of all images once, in order, read by `read_plain`."""
        for indices in torch.arange(len(self)).split(self.at_once):
            yield self._encode(self.read_plain, indices, None, reads), self.labels[indices]

    # no_grad, not inference_mode: the learner saves these features for its backward pass.
    @torch.no_grad()
    def _encode(self, read: ReadImages, indices: Tensor, generator: Generator | None, reads: Reads) -> ImageFeatures:
        images = read([self.paths[i] for i in indices.tolist()], generator=generator)
        return self.backbone.encode_images(images).keep(reads)

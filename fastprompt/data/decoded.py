"""Images as decoded levels in one buffer, from which any crop can be cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastprompt.data.levels import stored_size
from fastprompt.data.reading import default_workers, load_image, opened


@dataclass(frozen=True)
class DecodedImages:
    """n images of any sizes.

    Attributes:
        pixels: (N,) uint8 levels: the images, each (height, width, 3) flattened, one after another.
        places: (n, 3) int64 on the CPU: where in ``pixels`` each image starts, its height, its width.
    """

    pixels: Tensor
    places: Tensor

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, indices: Tensor) -> DecodedImages:
        """Some of the images, in the order of the indices; the levels are shared."""
        return DecodedImages(self.pixels, self.places[indices])

    def to(self, device: torch.device) -> DecodedImages:
        """The levels on another device, to which the copy is queued."""
        pixels = self.pixels.pin_memory() if device.type == "cuda" else self.pixels
        return DecodedImages(pixels.to(device, non_blocking=True), self.places)


def decode_images(paths: Sequence[Path], *, workers: int | None = None) -> DecodedImages:
    """Decode image files, on several threads.

    Args:
        paths: n files.
        workers: Threads; None for one a core, at most 8.

    Raises:
        InputError: If an image cannot be read; the sentence names it.
    """
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        sizes = list(pool.map(image_size, paths))
        ends = np.cumsum([0] + [3 * math.prod(size) for size in sizes])
        pixels = torch.empty(int(ends[-1]), dtype=torch.uint8)

        def fill(path: Path, start: int, size: tuple[int, int]) -> None:
            target = pixels[start : start + 3 * math.prod(size)].view(*size, 3)
            target.copy_(torch.from_numpy(np.array(load_image(path))))

        list(pool.map(fill, paths, ends[:-1].tolist(), sizes))
    places = [(start, *size) for start, size in zip(ends[:-1].tolist(), sizes, strict=True)]
    return DecodedImages(pixels, torch.tensor(places, dtype=torch.int64).view(-1, 3))


def decoded_bytes(paths: Sequence[Path], *, workers: int | None = None) -> int:
    """How many bytes ``decode_images`` would take, from the headers of the files alone.

    Raises:
        InputError: If a file is absent or no image; the sentence names it.
    """
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        return sum(3 * math.prod(size) for size in pool.map(image_size, paths))


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image, from its header."""
    with opened(path) as image:
        return stored_size(image)

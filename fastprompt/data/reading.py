"""From image files to a batch of tensors."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fastprompt.data.transforms import ImageTransform
from fastprompt.errors import InputError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""What counts as an image file in a folder, in lower case; other files are left alone."""

# What Pillow raises for files that are absent, not images, cut short or damaged inside.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def default_workers() -> int:
    """Return the number of threads that read files: one a core, at most 8."""
    return min(os.cpu_count() or 1, 8)


def find_images(folder: Path, *, recursive: bool = False) -> tuple[Path, ...]:
    """List the image files in a folder, sorted by name; hidden files are ignored.

    Args:
        folder: Where to look.
        recursive: Whether to look in its subfolders too.

    Raises:
        InputError: If the folder does not exist.
    """
    if not folder.is_dir():
        raise InputError(f"image folder {folder}: no such folder")
    return tuple(
        sorted(
            path
            for path in (folder.rglob("*") if recursive else folder.iterdir())
            if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
        )
    )


def load_image(path: str | Path) -> Image.Image:
    """Read an image as RGB. As in CLIP's own pipeline, an EXIF orientation is not applied.

    Raises:
        InputError: If the file is absent or cannot be decoded; the sentence names it.
    """
    with opened(path) as image:
        return image.convert("RGB")


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """An image file whose header is read; what Pillow raises here or in the block becomes one sentence."""
    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError as error:
        raise InputError(f"image {path}: no such file") from error
    except _DECODE_ERRORS as error:
        raise InputError(f"image {path}: cannot be read as an image ({error})") from error


def read_batch(paths: Sequence[Path], transform: ImageTransform, *, workers: int | None = None) -> Tensor:
    """Read, transform and stack images, on several threads (Pillow releases the interpreter while it decodes).

    Args:
        paths: B image files.
        transform: How a picture becomes a tensor.
        workers: Number of threads; None for one a core, at most 8.

    Returns:
        A (B, 3, S, S) float32 tensor, rows in the order of ``paths``.

    Raises:
        InputError: If an image cannot be read.
    """
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        return torch.stack(list(pool.map(lambda path: transform(load_image(path)), paths)))

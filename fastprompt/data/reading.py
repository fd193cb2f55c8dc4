"""From image files to a batch of tensors."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastprompt.data.levels import as_rgb
from fastprompt.data.transforms import ImageTransform
from fastprompt.errors import InputError

# Pillow knows more, and starts Ghostscript for one of them, whatever the file is called.
IMAGE_FORMATS = {
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "TIFF": (".tif", ".tiff"),
}
"""Formats that are read, by Pillow's names, told by the content of a file; and the endings that count as images."""
if find_spec("PIL._avif") is not None:
    IMAGE_FORMATS["AVIF"] = (".avif",)

IMAGE_SUFFIXES = tuple(sorted(suffix for suffixes in IMAGE_FORMATS.values() for suffix in suffixes))
"""What counts as an image file in a folder, in lower case; other files are left alone."""

# What Pillow raises for files that are absent, not images, cut short or damaged inside.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def default_workers() -> int:
    """Return the number of threads that read files: one a core, at most 8."""
    return min(os.cpu_count() or 1, 8)


def find_images(folder: Path, *, recursive: bool = False) -> tuple[Path, ...]:
    """List the image files in a folder, sorted by name; hidden files and folders are ignored.

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
            if path.suffix.lower() in IMAGE_SUFFIXES
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
            and path.is_file()
        )
    )


def load_image(path: str | Path) -> Image.Image:
    """Read an image as RGB: of levels deeper than 8 bits the high byte.

    As in CLIP's own pipeline, an EXIF orientation is not applied, in no format.

    Raises:
        InputError: If the file is absent, of none of ``IMAGE_FORMATS``, damaged, has more than twice
            ``PIL.Image.MAX_IMAGE_PIXELS`` pixels, or levels of unknown range; the sentence names it.
    """
    with opened(path) as image:
        return as_rgb(image)


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """An image file whose header is read; what Pillow raises here or in the block becomes one sentence."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for without end
            raise InputError(f"image {path}: expected a file, got a folder, pipe or device")
        with Image.open(path, formats=tuple(IMAGE_FORMATS)) as image:
            yield image
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"image {path}: no such file") from error
    except UnidentifiedImageError as error:
        formats = ", ".join(sorted(IMAGE_FORMATS))
        raise InputError(f"image {path}: cannot be read as an image (it is none of {formats})") from error
    except _DECODE_ERRORS as error:
        reason = getattr(error, "strerror", None) or error  # without the path, which some repeat
        raise InputError(f"image {path}: cannot be read as an image ({reason})") from error


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

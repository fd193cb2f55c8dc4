"""The definition of resized_crop, and the oracle of its tests."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resized_crop(
    pixels: Tensor,
    table: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Image by image, one axis after the other, as torchvision resizes.

    Args:
        pixels: (N,) uint8 or floating-point.
        table: (B, 8) int64: start, height and width of an image; top, left, height and width of the box; flip.
        size: S.
        mean: of the channels.
        std: of the channels.
        interpolation: "bicubic" or "bilinear".
        dtype: of the result.

    Returns:
        (B, 3, S, S).
    """
    sums = torch.promote_types(pixels.dtype, torch.float32)
    results = [pixels.new_empty(0, 3, size, size, dtype=sums)]
    for crop, flip in crops(pixels, table):
        crop = resized(crop.to(sums), size, interpolation, levels=pixels.dtype == torch.uint8)
        results.append(crop.flip(-1) if flip else crop)
    return normalized(torch.cat(results), pixels.dtype, mean, std).to(dtype)


def resized(crop: Tensor, size: int, interpolation: str, *, levels: bool) -> Tensor:
    """A floating-point crop (1, 3, h, w) as (1, 3, S, S), columns first; levels are rounded after each of both axes."""
    for shape in ((crop.shape[2], size), (size, size)):
        crop = F.interpolate(crop, shape, mode=interpolation, antialias=True)
        if levels:
            crop = (crop + 0.5).floor().clamp(0, 255)
    return crop


def crops(pixels: Tensor, table: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """Every box as a view (1, 3, h, w) of the pixels, and whether it is to be flipped."""
    for start, height, width, top, left, h, w, flip in table.tolist():
        image = pixels[start : start + 3 * height * width].view(height, width, 3)
        yield image[top : top + h, left : left + w].permute(2, 0, 1)[None], bool(flip)


def normalized(images: Tensor, kind: torch.dtype, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images (..., 3, S, S), levels if their pixels were of the kind uint8, normalised."""
    center, spread = (images.new_tensor(numbers)[:, None, None] for numbers in (mean, std))
    # In this order, as torchvision does: one factor would differ in the last bit.
    return ((images / 255 if kind == torch.uint8 else images) - center) / spread

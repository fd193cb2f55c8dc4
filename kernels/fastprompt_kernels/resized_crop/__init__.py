"""resized_crop: crops of images of any sizes, resized to one size, flipped and normalised."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..implementations import check_name
from . import op

__all__ = ["INTERPOLATIONS", "resized_crop"]

IMPLEMENTATIONS = ("auto", "reference", "blocked", "triton")
INTERPOLATIONS = ("bicubic", "bilinear")


def resized_crop(
    pixels: Tensor,
    places: Tensor,
    boxes: Tensor,
    size: int,
    *,
    flips: Tensor | None = None,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    interpolation: str = "bicubic",
    dtype: torch.dtype = torch.float32,
    impl: str = "auto",
) -> Tensor:
    """Cut a box out of every image, resize it to a square with antialiasing, flip it where asked, and normalise.

    This is the random resized crop of image training, once the boxes are drawn. Resizing is that of torchvision, and of
    Pillow up to version 12 (13 takes the rows of some boxes first): along each axis, columns first, a pixel of the
    result is a weighted mean of those of the box,

        weight[i, j] ~ filter((j + 1/2 - (i + 1/2) s) / max(s, 1)),    s = length of the box / size

    with the cubic filter (a = -1/2) or the triangle. Levels (uint8) are rounded and kept in 0 .. 255 after each of the
    two passes, as those libraries do; floating-point pixels are neither rounded nor clamped. The result is
    (level / 255 - mean) / std, or (pixel - mean) / std for floating-point pixels. There is no gradient.

    Args:
        pixels: (N,) uint8 levels or floating-point numbers: images of shape (height, width, 3) flattened, anywhere in
            it. Its device decides where this runs.
        places: (B, 3) int64 on the CPU: where in ``pixels`` each image starts, its height, its width.
        boxes: (B, 4) int64 on the CPU: top, left, height, width of each box, within its image.
        size: S, the side of the result.
        flips: (B,) bool on the CPU: which are mirrored left to right; None for none.
        mean: of the three channels.
        std: of the three channels, above 0.
        interpolation: "bicubic" or "bilinear".
        dtype: of the result; sums are in float32 (float64 for float64 pixels).
        impl: "reference" (plain torch, the definition), "blocked" (torch's resampling of levels, one image a core, any
            device), "triton" (one fused kernel: CUDA and ROCm, results in float32, float16 and bfloat16), or "auto":
            triton where it can run, blocked elsewhere. What is named explicitly is run or refused, never replaced.
            Among the three, levels differ by rounding alone: ``blocked`` has fixed-point weights of 16 bits.

    Returns:
        (B, 3, S, S) on the device of ``pixels``.

    Raises:
        TypeError: an argument is not of the kind named above.
        ValueError: shapes do not fit, an image lies outside of ``pixels`` or a box outside of its image, an unknown
            name, or an implementation that cannot run here.
    """
    check_name(impl, IMPLEMENTATIONS)
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {INTERPOLATIONS}, got {interpolation!r}")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean and std must be three numbers each, std above 0, got {mean} and {std}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    flips = torch.zeros(len(places), dtype=torch.bool) if flips is None else flips
    _check_kinds(pixels, places, boxes, flips)
    _check_bounds(pixels, places, boxes)
    table = torch.cat([places, boxes, flips[:, None]], dim=1)
    return op.resized_crop(pixels, table, size, list(mean), list(std), interpolation, dtype, impl)


def _check_kinds(pixels: Tensor, places: Tensor, boxes: Tensor, flips: Tensor) -> None:
    if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
        raise TypeError(f"pixels must be uint8 or floating-point, got {pixels.dtype}")
    if pixels.ndim != 1:
        raise ValueError(f"pixels must have shape (N,), got {tuple(pixels.shape)}")
    B = len(places)
    kinds = (("places", places, (B, 3), torch.int64), ("boxes", boxes, (B, 4), torch.int64))
    for name, tensor, shape, dtype in (*kinds, ("flips", flips, (B,), torch.bool)):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}")
        if tensor.shape != shape or tensor.device.type != "cpu":
            raise ValueError(
                f"{name} must have shape {shape} on the CPU, got {tuple(tensor.shape)} on {tensor.device.type}"
            )


def _check_bounds(pixels: Tensor, places: Tensor, boxes: Tensor) -> None:
    """A kernel would read beyond the memory of the image."""
    start, height, width = places.unbind(1)
    outside = (start < 0) | (height < 1) | (width < 1) | (start + 3 * height * width > len(pixels))
    if outside.any():
        index = int(outside.int().argmax())
        raise ValueError(
            f"places[{index}] = {places[index].tolist()} (start, height, width) is no image within the {len(pixels)} "
            "numbers of pixels"
        )
    top, left, h, w = boxes.unbind(1)
    outside = (top < 0) | (left < 0) | (h < 1) | (w < 1) | (top + h > height) | (left + w > width)
    if outside.any():
        index = int(outside.int().argmax())
        raise ValueError(
            f"boxes[{index}] = {boxes[index].tolist()} (top, left, height, width) must lie within its image of height "
            f"{int(height[index])} and width {int(width[index])}"
        )

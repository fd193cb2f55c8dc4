"""Registration of resized_crop with torch: schema and fake. It has no gradient, and autocast leaves it alone."""

import torch
from torch import Tensor

from ..implementations import on_its_device, runs_triton
from . import blocked, reference


def resized_crop(
    pixels: Tensor,
    table: Tensor,
    size: int,
    mean: list[float],
    std: list[float],
    interpolation: str,
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    """Validated arguments in, images out."""
    if impl == "reference":
        return reference.resized_crop(pixels, table, size, mean, std, interpolation, dtype)
    return _forward(pixels, table, size, mean, std, interpolation, dtype, impl)


@torch.library.custom_op("fastprompt::resized_crop", mutates_args=())
@on_its_device
def _forward(
    pixels: Tensor, table: Tensor, size: int, mean: list[float], std: list[float], interpolation: str,
    dtype: torch.dtype, impl: str,
) -> Tensor:  # fmt: skip
    too_much = "the kernel takes no float64 pixels" if pixels.dtype == torch.float64 else None
    if runs_triton(impl, pixels.device, dtype, too_much):
        from . import triton

        return triton.forward(pixels, table, size, mean, std, interpolation, dtype)
    return blocked.forward(pixels, table, size, mean, std, interpolation, dtype)


@_forward.register_fake
def _(
    pixels: Tensor, table: Tensor, size: int, mean: list[float], std: list[float], interpolation: str,
    dtype: torch.dtype, impl: str,
) -> Tensor:  # fmt: skip
    return pixels.new_empty(len(table), 3, size, size, dtype=dtype)

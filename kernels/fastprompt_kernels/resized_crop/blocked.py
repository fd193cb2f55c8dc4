"""resized_crop with torch's own resampling of levels, which has vector instructions and 16-bit weights on processors.

Written for processors, where matrix products of every image with its weights took five times as long.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cores import on_all_cores
from .reference import crops, normalized, resized

# Kinds of devices on which torch resamples levels, axis after axis.
RESAMPLES_LEVELS = ("cpu",)


def forward(
    pixels: Tensor,
    table: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
    dtype: torch.dtype,
) -> Tensor:
    """As the reference, one image a core."""
    sums = torch.promote_types(pixels.dtype, torch.float32)
    result = torch.empty(len(table), 3, size, size, dtype=dtype, device=pixels.device)

    def fill(index: int, crop: Tensor, flip: bool) -> None:
        if pixels.dtype == torch.uint8 and pixels.device.type not in RESAMPLES_LEVELS:
            image = resized(crop.to(sums), size, interpolation, levels=True)
        else:
            image = F.interpolate(crop, (size, size), mode=interpolation, antialias=True)
        image = normalized(image[0].to(sums), pixels.dtype, mean, std)
        result[index] = image.flip(-1) if flip else image

    on_all_cores(fill, ((i, *crop) for i, crop in enumerate(crops(pixels, table))), pixels.device)
    return result

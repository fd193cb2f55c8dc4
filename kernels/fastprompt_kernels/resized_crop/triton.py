"""The Triton kernel of resized_crop: a program makes a tile of one channel of one image, with nothing in between kept.

Both passes are matrix products of a tile with the weights of an axis, which are made where they are used. Weights are
zero but for a band, so a program reads the rows and columns alone that its tile depends on.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import architecture


@triton.jit
def _weights(position, result, scale, length, CUBIC: tl.constexpr):
    """The weight of positions of a box for pixels of the result, which broadcast; their sum is not 1 yet."""
    distance = tl.abs(position + 0.5 - (result + 0.5) * scale) / tl.maximum(scale, 1.0)
    if CUBIC:
        near = (1.5 * distance - 2.5) * distance * distance + 1.0
        far = ((2.5 - 0.5 * distance) * distance - 4.0) * distance + 2.0
        weight = tl.where(distance < 1.0, near, tl.where(distance < 2.0, far, 0.0))
    else:
        weight = tl.maximum(1.0 - distance, 0.0)
    return tl.where(position < length, weight, 0.0)


@triton.jit
def _band(first, last, scale, length, CUBIC: tl.constexpr):
    """Between which positions of a box the weights of pixels of the result are not zero, and one or two more."""
    reach = (2.0 if CUBIC else 1.0) * tl.maximum(scale, 1.0) + 1.0
    start = tl.maximum(tl.floor((first + 0.5) * scale - reach), 0.0)
    stop = tl.floor((last + 0.5) * scale + reach) + 1.0
    return start.to(tl.int32), tl.minimum(stop.to(tl.int32), length)


@triton.jit
def _as_levels(x, LEVELS: tl.constexpr):
    return tl.minimum(tl.maximum(tl.floor(x + 0.5), 0.0), 255.0) if LEVELS else x


@triton.jit
def resized_crop_kernel(
    pixels, table, mean, std, result, SIZE,
    LEVELS: tl.constexpr, CUBIC: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """BLOCK_Y x BLOCK_X of channel c of image b, for program (3 b + c, ., .)."""
    plane = tl.program_id(0)
    channel = plane % 3
    entry = table + plane // 3 * 8
    width = tl.load(entry + 2)
    origin = tl.load(entry) + (tl.load(entry + 3) * width + tl.load(entry + 4)) * 3 + channel
    box_height, box_width = tl.load(entry + 5).to(tl.int32), tl.load(entry + 6).to(tl.int32)
    scale_y, scale_x = box_height.to(tl.float32) / SIZE, box_width.to(tl.float32) / SIZE
    first_y, first_x = tl.program_id(1) * BLOCK_Y, tl.program_id(2) * BLOCK_X
    y, x = first_y + tl.arange(0, BLOCK_Y), first_x + tl.arange(0, BLOCK_X)
    top, bottom = _band(first_y, tl.minimum(first_y + BLOCK_Y, SIZE) - 1, scale_y, box_height, CUBIC)
    left, right = _band(first_x, tl.minimum(first_x + BLOCK_X, SIZE) - 1, scale_x, box_width, CUBIC)

    total = tl.zeros((BLOCK_Y, BLOCK_X), tl.float32)
    total_weight = tl.zeros((BLOCK_Y,), tl.float32)
    for start_row in range(top, bottom, ROWS):
        row = start_row + tl.arange(0, ROWS)
        line = pixels + origin + row.to(tl.int64) * width * 3
        narrow = tl.zeros((ROWS, BLOCK_X), tl.float32)  # rows of the box, columns of the result
        narrow_weight = tl.zeros((BLOCK_X,), tl.float32)
        for start_column in range(left, right, COLUMNS):
            column = start_column + tl.arange(0, COLUMNS)
            inside = (row < box_height)[:, None] & (column < box_width)[None, :]
            values = tl.load(line[:, None] + column[None, :] * 3, mask=inside, other=0).to(tl.float32)
            weights = _weights(column[:, None], tl.minimum(x, SIZE - 1)[None, :], scale_x, box_width, CUBIC)
            narrow_weight += tl.sum(weights, 0)
            narrow = tl.dot(values, weights, narrow, input_precision="ieee")
        narrow = _as_levels(narrow / narrow_weight[None, :], LEVELS)
        weights = _weights(row[None, :], tl.minimum(y, SIZE - 1)[:, None], scale_y, box_height, CUBIC)
        total_weight += tl.sum(weights, 1)
        total = tl.dot(weights, narrow, total, input_precision="ieee")
    total = _as_levels(total / total_weight[:, None], LEVELS)

    total = ((total / 255.0 if LEVELS else total) - tl.load(mean + channel)) / tl.load(std + channel)
    target = tl.where(tl.load(entry + 7) != 0, SIZE - 1 - x, x)
    address = result + plane.to(tl.int64) * SIZE * SIZE + y[:, None] * SIZE + target[None, :]
    tl.store(address, total.to(result.dtype.element_ty), mask=(y < SIZE)[:, None] & (x < SIZE)[None, :])


def forward(
    pixels: Tensor,
    table: Tensor,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
    dtype: torch.dtype,
) -> Tensor:
    """As the reference; the table and the constants are copied to the device without waiting for it."""
    result = torch.empty(len(table), 3, size, size, dtype=dtype, device=pixels.device)
    if len(table) == 0:
        return result
    constants = torch.tensor([mean, std], dtype=torch.float32)
    if pixels.device.type != "cpu":
        table, constants = (t.pin_memory().to(pixels.device, non_blocking=True) for t in (table, constants))
    levels = pixels.dtype == torch.uint8
    blocks = launch_blocks(architecture(pixels.device), levels)
    grid = 3 * len(table), triton.cdiv(size, blocks["BLOCK_Y"]), triton.cdiv(size, blocks["BLOCK_X"])
    resized_crop_kernel[grid](
        pixels, table, constants[0], constants[1], result, size,
        LEVELS=levels, CUBIC=interpolation == "bicubic", **blocks,
    )  # fmt: skip
    return result


def launch_blocks(target: str, levels: bool) -> dict[str, int]:
    """Tile sizes and warps for levels or floating-point pixels: with 32 columns of the latter at a time, some spill.

    A tile of 32 pixels depends on 48 rows and columns of a box of 300: little is read twice.
    """
    blocks = {"BLOCK_Y": 32, "BLOCK_X": 32, "ROWS": 32, "COLUMNS": 32 if levels else 16}
    # Left alone, the ptxas of Triton 3.6 stops at 80 or 168 registers and spills a few bytes.
    limit = {} if target == "gfx942" else {"maxnreg": 128 if levels else 184}
    return {**blocks, "num_warps": 4, "num_stages": 2, **limit}

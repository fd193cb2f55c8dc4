"""Triton kernels of patch_statistics: the logits stay in registers.

A program of the forward pass holds some patches and goes through all classes once. It carries the largest logit so
far, the sum of the exponentials of the differences to it, and the sum of these times the differences. The backward pass
makes the logits again. Every sum has a fixed order and nothing is added atomically, so results are the same in every
run.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import architecture, dot_dtype, index_dtype, parts_of_a_sum


@triton.jit
def _floor(x):
    """Minus infinity becomes a number, so that its product with its exponential is 0; what is no number stays so."""
    return tl.maximum(x, -1e30, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _addresses(features, index, INNER, stride_outer, stride_inner):
    """The first elements of rows that are numbered through two axes, of which the inner one is INNER long."""
    return features + index // INNER * stride_outer + index % INNER * stride_inner


@triton.jit
def _products(
    left, right, left_inside, right_inside, D, stride_left, stride_right,
    DOT: tl.constexpr, INDEX: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The products of all rows on the left with all on the right, given by the addresses of their first elements."""
    total = tl.zeros((left.shape[0], right.shape[0]), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D).to(INDEX)
        rows = tl.load(
            left[:, None] + d[None, :] * stride_left, mask=left_inside[:, None] & (d < D)[None, :], other=0.0
        )
        address = right[None, :] + d[:, None] * stride_right
        columns = tl.load(address, mask=right_inside[None, :] & (d < D)[:, None], other=0.0)
        total = tl.dot(rows.to(DOT), columns.to(DOT), total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["ROWS", "P", "C"])
def statistics_kernel(
    patches, prompts, labels, maximum, logsumexp, entropy, rank, largest, scale,
    ROWS, P, C, D,
    stride_patches_b, stride_patches_p, stride_patches_d, stride_prompts_c, stride_prompts_d,
    KEEP: tl.constexpr, RANK: tl.constexpr, DOT: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The statistics of BLOCK_R of the ROWS = B * P patches."""
    start_row = tl.program_id(0).to(INDEX) * BLOCK_R
    row = start_row + tl.arange(0, BLOCK_R)
    inside = row < ROWS
    left = _addresses(patches, row, P, stride_patches_b, stride_patches_p)
    column = tl.arange(0, BLOCK_C)
    if RANK:
        # The logit of the label must be the same bits here and in the sweep. So it comes from a product of the same
        # shape, whose column j is the label of the j-th image that this tile has patches of.
        tl.static_assert(BLOCK_C >= BLOCK_R)
        image = start_row // P + column
        known = tl.load(labels + image, mask=image < ROWS // P, other=-1).to(INDEX)
        valid = (known >= 0) & (known < C)
        right = prompts + known * stride_prompts_c
        logits = scale * _products(
            left, right, inside, valid, D, stride_patches_d, stride_prompts_d, DOT, INDEX, BLOCK_D
        )
        of_row = (row // P - start_row // P).to(tl.int32)[:, None] == column[None, :]
        own = tl.max(tl.where(of_row & valid[None, :], logits, float("-inf")), 1)[:, None]
        label = tl.load(labels + row // P, mask=inside, other=0).to(tl.int32)[:, None]
        before = tl.zeros((BLOCK_R,), tl.int32)

    # Not minus infinity, to which a difference may be no number.
    peak = tl.full((BLOCK_R,), -3.4e38, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    weighted = tl.zeros((BLOCK_R,), tl.float32)
    first = tl.zeros((BLOCK_R,), tl.int32)
    for start in range(0, C, BLOCK_C):
        c = start + column
        right = prompts + c.to(INDEX) * stride_prompts_c
        logits = scale * _products(
            left, right, inside, c < C, D, stride_patches_d, stride_prompts_d, DOT, INDEX, BLOCK_D
        )
        c = c[None, :]
        logits = tl.where(c < C, logits, float("-inf"))
        if RANK:
            ahead = tl.where(c < label, logits >= own, logits > own)
            before += tl.sum(ahead.to(tl.int32), 1)
        highest = tl.max(logits, 1)
        if KEEP:
            here = tl.min(tl.where(logits == highest[:, None], c, C), 1)
            first = tl.where(highest > peak, here, first)
        highest = tl.maximum(peak, highest)
        shift = _floor(peak - highest)
        kept = tl.exp(shift)
        difference = _floor(logits - highest[:, None])
        terms = tl.exp(difference)
        weighted = kept * (weighted + total * shift) + tl.sum(terms * difference, 1)
        total = kept * total + tl.sum(terms, 1)
        peak = highest

    tl.store(maximum + row, tl.where(total > 0, peak, tl.log(total)), mask=inside)
    tl.store(logsumexp + row, peak + tl.log(total), mask=inside)
    tl.store(entropy + row, tl.log(total) - weighted / total, mask=inside)
    if RANK:
        tl.store(rank + row, before.to(tl.int64), mask=inside)
    if KEEP:
        tl.store(largest + row, first, mask=inside)


@triton.jit
def _logit_grad(logits, grads, logsumexp, entropy, largest, row, c, ROWS, C):
    """The gradient of the logits of rows and classes c, which broadcast to a tile; 0 beyond the last of them."""
    inside = row < ROWS
    of_maximum = tl.load(grads + row, mask=inside, other=0.0)
    of_logsumexp = tl.load(grads + ROWS + row, mask=inside, other=0.0)
    of_entropy = tl.load(grads + 2 * ROWS + row, mask=inside, other=0.0)
    log_probability = logits - tl.load(logsumexp + row, mask=inside, other=0.0)
    spread = log_probability + tl.load(entropy + row, mask=inside, other=0.0)
    grad = tl.exp(log_probability) * (of_logsumexp - of_entropy * spread)
    grad += tl.where(tl.load(largest + row, mask=inside, other=-1) == c, of_maximum, 0.0)
    return tl.where(inside & (c < C), grad, 0.0)


@triton.jit(
    do_not_specialize=["MINE", "OTHERS", "PER_SPLIT"], do_not_specialize_on_alignment=["MINE_INNER", "OTHERS_INNER"]
)
def statistics_grad_kernel(
    mine, others, grads, unit, logsumexp, entropy, largest, result, scale,
    MINE, OTHERS, PER_SPLIT, D,
    MINE_INNER, stride_mine_outer, stride_mine_inner, stride_mine_d,
    OTHERS_INNER, stride_others_outer, stride_others_inner, stride_others_d, stride_unit,
    PATCHES: tl.constexpr, DOT: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_MINE: tl.constexpr, BLOCK_OTHERS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_RESULT: tl.constexpr,
):  # fmt: skip
    """BLOCK_MINE x BLOCK_RESULT of the gradient of patches (PATCHES) or prompts, summed over PER_SPLIT of the others.

    Of (splits, MINE, D) results, program (i, j, s) writes rows i, columns j and split s.
    """
    i = tl.program_id(0).to(INDEX) * BLOCK_MINE + tl.arange(0, BLOCK_MINE)
    d = tl.program_id(1).to(INDEX) * BLOCK_RESULT + tl.arange(0, BLOCK_RESULT)
    split = tl.program_id(2).to(INDEX)
    left = _addresses(mine, i, MINE_INNER, stride_mine_outer, stride_mine_inner)
    total = tl.zeros((BLOCK_MINE, BLOCK_RESULT), tl.float32)
    for start in range(0, PER_SPLIT, BLOCK_OTHERS):
        j = split * PER_SPLIT + start + tl.arange(0, BLOCK_OTHERS)
        right = _addresses(others, j, OTHERS_INNER, stride_others_outer, stride_others_inner)
        logits = scale * _products(
            left, right, i < MINE, j < OTHERS, D, stride_mine_d, stride_others_d, DOT, INDEX, BLOCK_D
        )
        if PATCHES:
            weights = _logit_grad(logits, grads, logsumexp, entropy, largest, i[:, None], j[None, :], MINE, OTHERS)
        else:
            weights = _logit_grad(logits, grads, logsumexp, entropy, largest, j[None, :], i[:, None], OTHERS, MINE)
        address = right[:, None] + d[None, :] * stride_others_d
        features = tl.load(address, mask=(j < OTHERS)[:, None] & (d < D)[None, :], other=0.0)
        total = tl.dot(weights.to(DOT), features.to(DOT), total, input_precision="ieee")
    total *= scale * tl.load(unit + i * stride_unit, mask=i < MINE, other=0.0)[:, None]
    address = result + (split * MINE + i[:, None]) * D + d[None, :]
    tl.store(address, total.to(result.dtype.element_ty), mask=(i < MINE)[:, None] & (d < D)[None, :])


def forward(
    patches: Tensor, prompts: Tensor, scale: float, labels: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The statistics of patches (B, P, D) over prompts (C, D), with labels (B,) or None.

    Returns:
        maximum, logsumexp and entropy (B, P) float32; rank (B, P) int64, (0,) without labels; largest (B, P) int32, the
        class of the maximum, (0,) without keep; and (0,), because the logits are never kept.
    """
    (B, P, D), C = patches.shape, len(prompts)
    statistics = [torch.empty(B, P, dtype=torch.float32, device=patches.device) for _ in range(3)]
    rank = torch.empty((B, P) if labels is not None else 0, dtype=torch.int64, device=patches.device)
    largest = torch.empty((B, P) if keep else 0, dtype=torch.int32, device=patches.device)
    index = index_dtype(patches, prompts)
    blocks = forward_blocks(patches.dtype, index)
    if B > 0:
        statistics_kernel[(triton.cdiv(B * P, blocks["BLOCK_R"]),)](
            patches, prompts, rank if labels is None else labels.contiguous(), *statistics, rank, largest, scale,
            B * P, P, C, D, *patches.stride(), *prompts.stride(),
            KEEP=keep, RANK=labels is not None, DOT=dot_dtype(patches.dtype), INDEX=index,
            **blocks,
        )  # fmt: skip
    return *statistics, rank, largest, torch.empty(0, dtype=torch.float32, device=patches.device)


def backward(
    grads: Sequence[Tensor],
    patches: Tensor,
    prompts: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    largest: Tensor,
    kept: Tensor,
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients (B, P, D) and (C, D) in the inputs' dtype, from those of maximum, logsumexp and entropy, (B, P).

    A gradient that is not wanted is (0,). The logits are made again, so kept is (0,).
    """
    saved = torch.stack([grad.flatten() for grad in grads]), logsumexp, entropy, largest
    classes = prompts[:, None]  # as images of one patch
    of_patches, of_prompts = patches.new_empty(0), prompts.new_empty(0)
    if wanted[0]:
        of_patches = _gradient(patches, classes, saved, scale, of="patches").view(patches.shape)
    if wanted[1]:
        of_prompts = _gradient(classes, patches, saved, scale, of="prompts")
    return of_patches, of_prompts


def _gradient(mine: Tensor, others: Tensor, saved: Sequence[Tensor], scale: float, of: str) -> Tensor:
    """The gradient (rows, D) of the rows of one of patches (B, P, D) and prompts (C, 1, D), from all rows of the other.

    Where its tiles are few, the sum is cut into parts, which are added at the end.
    """
    grads, *statistics = saved
    (outer, inner, D), (others_outer, others_inner, _) = mine.shape, others.shape
    rows = outer * inner
    if grads.numel() == 0:
        return mine.new_zeros(rows, D)
    # The tiles depend on the index type, and the parts on the tiles. Where there are parts, these are few.
    index = index_dtype(mine, others, torch.empty(rows, D, device="meta"))
    blocks = backward_blocks(architecture(mine.device), mine.dtype, index)
    # A patch has a unit of its own, so that its gradient does not depend on the rest of the batch.
    unit = _unit(grads, dim=0 if of == "patches" else None)
    tiles = triton.cdiv(rows, blocks["BLOCK_MINE"]), triton.cdiv(D, blocks["BLOCK_RESULT"])
    splits = 1 if of == "patches" else parts_of_a_sum(tiles[0] * tiles[1])
    steps = triton.cdiv(triton.cdiv(others_outer * others_inner, splits), blocks["BLOCK_OTHERS"])
    splits = triton.cdiv(others_outer * others_inner, steps * blocks["BLOCK_OTHERS"])
    result = mine.new_empty(splits, rows, D, dtype=mine.dtype if splits == 1 else torch.float32)
    statistics_grad_kernel[(*tiles, splits)](
        mine, others, grads / unit, unit, *statistics, result, scale,
        rows, others_outer * others_inner, steps * blocks["BLOCK_OTHERS"], D,
        inner, *mine.stride(), others_inner, *others.stride(), int(unit.ndim > 0),
        PATCHES=of == "patches", DOT=dot_dtype(mine.dtype), INDEX=index, **blocks,
    )  # fmt: skip
    return result[0] if splits == 1 else result.sum(0).to(mine.dtype)


def _unit(grads: Tensor, dim: int | None) -> Tensor:
    """A power of two near the largest of the gradients, in whose unit they are well within the range of float16."""
    largest = grads.abs().amax() if dim is None else grads.abs().amax(dim)
    return torch.ldexp(torch.ones_like(largest), largest.frexp().exponent)


def forward_blocks(dtype: torch.dtype, index: tl.dtype) -> dict[str, int]:
    """Tile sizes and warps of the forward kernel, for offsets of int32 or int64.

    The largest square tiles that spill on no target: with more of D at a time, or a third stage of loads, some do. The
    operands of a float32 product are in registers, and int64 offsets take more of them too.
    """
    if dtype.itemsize == 2:
        blocks = {"BLOCK_R": 128, "BLOCK_C": 128, "BLOCK_D": 32}
    elif index == tl.int32:
        blocks = {"BLOCK_R": 64, "BLOCK_C": 64, "BLOCK_D": 16}
    else:
        blocks = {"BLOCK_R": 32, "BLOCK_C": 32, "BLOCK_D": 32}
    return {**blocks, "num_warps": 8, "num_stages": 2}


def backward_blocks(target: str, dtype: torch.dtype, index: tl.dtype) -> dict[str, int]:
    """Tile sizes and warps of the backward kernel, for an architecture and offsets of int32 or int64.

    The logits are made once for every BLOCK_RESULT columns of the gradient, so these are many: 64 x 512 sums are 128
    registers in each thread of 8 warps, which leaves room for a tile of 64 x 32 logits and not for 64 x 64. With int64
    offsets there is room for half of it, and on gfx942 for 16 features at a time.
    """
    if dtype.itemsize == 2:
        blocks = {"BLOCK_MINE": 64, "BLOCK_OTHERS": 32, "BLOCK_D": 16 if target == "gfx942" else 32}
        blocks["BLOCK_RESULT"] = 512 if index == tl.int32 else 256
    else:
        blocks = {"BLOCK_MINE": 32, "BLOCK_OTHERS": 32, "BLOCK_D": 16, "BLOCK_RESULT": 128}
        # Left alone, ptxas stops at 128 registers there and spills a few bytes.
        blocks |= {"maxnreg": 224} if target in ("sm_90", "sm_100") else {}
    return {**blocks, "num_warps": 8, "num_stages": 2}

"""topk_similarity in Triton: the similarity stays in registers, one bit per element and scale is written.

This file holds what runs on the host: which kernel, which tiles, which index type. The forward kernel is in
triton_forward.py, the backward kernels in triton_backward.py. Results are the same in every run, and values and the
gradients of the patches of an image do not depend on the other images of the batch.

Layout of the selection: 128 patches are four words of 32 bits. Word w of them holds the patches 8 i + 2 w and
8 i + 2 w + 1 as its bits 2 i and 2 i + 1. That is how tensor cores spread the columns of a product over threads, so
every thread packs and unpacks its own words.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import architecture, dot_dtype, index_dtype, parts_of_a_sum
from .triton_backward import grad_patches_kernel, grad_prompts_kernel
from .triton_forward import forward_kernel


def saved_size(B: int, P: int, C: int, k: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of the selection that the forward pass keeps: (B, N * S, C, 4 * ceil(P / 128)) int32."""
    return (B, len(k) * len(k[0]), C, 4 * -(-P // 128)), torch.int32


def forward(patches: Tensor, prompts: Tensor, k: Sequence[Sequence[int]], keep: bool) -> tuple[Tensor, Tensor]:
    """The values and, if they are to be kept, the selection bits.

    Args:
        patches: (B, P, D).
        prompts: (N, C, D).
        k: for every prompt its S scales, each from 1 to P.
        keep: whether the backward pass will follow; otherwise no selection is written.

    Returns:
        values (B, N, C) float32, and the selection of `saved_size`, or an empty tensor (0,).
    """
    (B, P, D), (N, C, _), S = patches.shape, prompts.shape, len(k[0])
    values = torch.empty(B, N, C, dtype=torch.float32, device=patches.device)
    shape, dtype = saved_size(B, P, C, k) if keep else ((0,), torch.int32)
    selected = torch.empty(shape, dtype=dtype, device=patches.device)
    if values.numel() == 0 or D == 0:
        return values.zero_(), selected.zero_()
    patches, prompts = _aligned(patches), _aligned(prompts)
    index = index_dtype(patches, prompts, values, selected)
    # One launch a prompt: K, the length of the sorted run, is a constant of the kernel and the main part of its cost.
    for n, scales in enumerate(k):
        blocks = forward_blocks(architecture(patches.device), patches.dtype, P, max(scales), keep)
        images = blocks["BLOCK_P"] >> blocks["LOG_ROW"]
        forward_kernel[(triton.cdiv(B, images) * triton.cdiv(C, blocks["BLOCK_C"]),)](
            patches, prompts[n], values[:, n], selected[:, n * S :] if keep else selected, tuple(map(float, scales)),
            B, C, P, patches.shape[2], *patches.stride(), *prompts.stride()[1:], values.stride(0), selected.stride(0),
            SCALES=S, KEEP=keep, DOT=dot_dtype(patches.dtype), INDEX=index, **blocks,
        )  # fmt: skip
    return values, selected


def backward(
    grad: Tensor,
    patches: Tensor | None,
    prompts: Tensor | None,
    selected: Tensor,
    k: Sequence[Sequence[int]],
    P: int,
) -> tuple[Tensor, Tensor]:
    """The gradients (B, P, D) and (N, C, D) in the inputs' dtype, from that of the values (B, N, C).

    Each needs the other input. Where that is None the gradient is not made, and is (0,).
    """
    of_patches = grad.new_empty(0) if prompts is None else grad_patches(grad, prompts, selected, k, P)
    return of_patches, grad.new_empty(0) if patches is None else grad_prompts(grad, patches, selected, k)


def grad_patches(grad: Tensor, prompts: Tensor, selected: Tensor, k: Sequence[Sequence[int]], P: int) -> Tensor:
    """The gradient (B, P, D) in the inputs' dtype, from that of the values (B, N, C)."""
    prompts, width = _aligned(prompts), prompts.shape[2]
    B, (N, C, D) = len(grad), prompts.shape
    result = torch.empty(B, P, D, dtype=prompts.dtype, device=prompts.device)
    blocks = grad_patches_blocks(prompts.dtype, P)
    if result.numel() > 0:
        grad_patches_kernel[(B * triton.cdiv(P, blocks["BLOCK_P"]), triton.cdiv(D, blocks["BLOCK_D"]))](
            _level_grad(grad, k), selected, prompts, result, N, C, P, D, *prompts.stride(),
            SCALES=len(k[0]), DOT=dot_dtype(prompts.dtype), INDEX=index_dtype(prompts, result, selected), **blocks,
        )  # fmt: skip
    return result[..., :width].contiguous()


def grad_prompts(grad: Tensor, patches: Tensor, selected: Tensor, k: Sequence[Sequence[int]]) -> Tensor:
    """The gradient (N, C, D) in the inputs' dtype, from that of the values (B, N, C).

    With few classes there are few tiles. The images are then shared out to several programs a tile, whose sums are
    added in the end, always in the same order.
    """
    patches, width = _aligned(patches), patches.shape[2]
    (B, P, D), (_, N, C) = patches.shape, grad.shape
    # The tiles depend on the index type, and the parts on the tiles. Where there are parts, these are few.
    index = index_dtype(patches, selected, torch.empty(N, C, D, device="meta"))
    blocks = grad_prompts_blocks(patches.dtype, index)
    rows, columns = N * triton.cdiv(C, blocks["BLOCK_C"]), triton.cdiv(D, blocks["BLOCK_D"])
    images = triton.cdiv(B, max(1, min(B, parts_of_a_sum(rows * columns))))
    parts = triton.cdiv(B, max(1, images))
    dtype = patches.dtype if parts == 1 else torch.float32
    partial = torch.empty(parts, N, C, D, dtype=dtype, device=patches.device)
    if partial.numel() > 0:
        grad_prompts_kernel[(rows, columns, parts)](
            _level_grad(grad, k), selected, patches, partial, B, N, C, P, D, images, *patches.stride(),
            SCALES=len(k[0]), DOT=dot_dtype(patches.dtype), INDEX=index, **blocks,
        )  # fmt: skip
    result = partial[0] if parts == 1 else partial.sum(0).to(patches.dtype)
    return result[..., :width].contiguous()


def forward_blocks(target: str, dtype: torch.dtype, P: int, k: int, keep: bool) -> dict[str, int | bool]:
    """Tile sizes and warps of the forward kernel.

    64 classes x 256 patches on 4 warps leave 64 columns of a row in one thread of sm_90, where its network runs without
    exchange: 13 instructions an element for 16 of 196 patches. The other targets spread a row over more threads and
    spill with 4 warps, and so does sm_90 where a run of 32 and the selection are wanted at once. A float32 product
    keeps its operands in registers too and gets a quarter of the tile. Up to 64 patches, two images share 128 columns:
    with 256 the last exchanges spill. Above 256, patches come in chunks of 128, which waste less of the last chunk and
    leave registers for the run; a run of 64 does not fit beside 256 columns, so it has them too.
    """
    log_k, wide = max(2, (k - 1).bit_length()), dtype.itemsize == 2
    blocks = {"LOG_K": log_k, "BLOCK_C": 64 if wide else 16, "BLOCK_D": 32 if wide else 16}
    if P > 256 or log_k == 6:
        blocks |= {"CHUNKED": True, "LOG_ROW": 7, "BLOCK_P": 128}
    elif P > 64:
        blocks |= {"CHUNKED": False, "LOG_ROW": 8, "BLOCK_P": 256}
    else:
        blocks |= {"CHUNKED": False, "LOG_ROW": 6, "BLOCK_P": 128}
    fits = log_k < 5 or blocks["BLOCK_P"] == 128 or not keep
    warps, stages = (4, 4) if target == "sm_90" and wide and fits else (8, 2)
    # Left alone, ptxas stops at 128 registers with 8 warps there and spills a few bytes. At 224 a run of 64 spills 8
    # with Triton 3.9; no fewer programs fit beside each other at 240.
    limit = {"maxnreg": 240 if log_k == 6 else 224} if warps == 8 and target in ("sm_90", "sm_100") else {}
    return {**blocks, "num_warps": warps, "num_stages": stages, **limit}


def grad_patches_blocks(dtype: torch.dtype, P: int) -> dict[str, int]:
    """Tile sizes and warps of the gradient of the patches."""
    block_p, block_d = (64 if P <= 64 else 128, 256) if dtype.itemsize == 2 else (64, 32)
    warps = block_p // 16 if dtype.itemsize == 2 else 4
    return {"BLOCK_P": block_p, "BLOCK_C": 32, "BLOCK_D": block_d, "num_warps": warps, "num_stages": 3}


def grad_prompts_blocks(dtype: torch.dtype, index: tl.dtype) -> dict[str, int]:
    """Tile sizes and warps of the gradient of the prompts; int64 offsets take registers from half of the sums."""
    if dtype.itemsize == 2:
        block_d = 256 if index == tl.int32 else 128
        return {"BLOCK_C": 128, "BLOCK_P": 32, "BLOCK_D": block_d, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_C": 32, "BLOCK_P": 32, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}


def _aligned(features: Tensor) -> Tensor:
    """The features (.., .., D), or a copy padded with zeros, so that the kernels can load 16 elements at once."""
    strides = features.stride()
    if features.shape[2] % 16 == 0 and strides[2] == 1 and all(s % 16 == 0 for s in strides[:2]):
        return features
    return torch.nn.functional.pad(features, (0, -features.shape[2] % 16)).contiguous()


def _level_grad(grad: Tensor, k: Sequence[Sequence[int]]) -> Tensor:
    """(B, N * S, C) float32: what every selected patch of a scale receives. Divided here, where no table is copied."""
    S = len(k[0])
    return torch.stack([grad[:, n] / (scale * S) for n, scales in enumerate(k) for scale in scales], dim=1)

"""Triton kernels of topk_similarity: the similarity stays in registers, one bit per element and scale is written.

A program of the forward pass holds the similarity of some classes to all patches of one image, which is why P is
bounded. The backward pass is two matrix products with the gradient of the similarity, which is built from the bits.
Every sum has a fixed order and nothing is added atomically, so results are the same in every run.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_PATCHES = 1024


@triton.jit
def _compare(x, SPACING: tl.constexpr, RUN: tl.constexpr):
    """Order the pairs SPACING apart on axis 1: the larger first in even runs of RUN elements, last in odd runs.

    Written with min and max over an axis of two, which the compiler turns into single instructions.
    """
    ROWS: tl.constexpr = x.shape[0]
    LENGTH: tl.constexpr = x.shape[1]
    pairs = x.reshape(ROWS, LENGTH // (2 * SPACING), 2, SPACING)
    larger = tl.max(pairs, axis=2, keep_dims=True)
    smaller = tl.min(pairs, axis=2, keep_dims=True)
    odd_run = (tl.arange(0, LENGTH // (2 * SPACING)) * (2 * SPACING) // RUN) & 1
    larger_first = tl.arange(0, 2)[None, None, :, None] == odd_run[None, :, None, None]
    return tl.where(larger_first, larger, smaller).reshape(ROWS, LENGTH)


@triton.jit
def _largest(x, LOG_K: tl.constexpr, LOG_LENGTH: tl.constexpr):
    """The 2^LOG_K largest of every row in descending order, by a bitonic network."""
    ROWS: tl.constexpr = x.shape[0]
    LENGTH: tl.constexpr = 1 << LOG_LENGTH
    K: tl.constexpr = 1 << LOG_K
    # Which element sits where does not matter. A tensor-core result has the bits 1 and 2 of the column on different
    # lanes: with those outermost, most stages stay within a thread.
    x = x.reshape(ROWS, LENGTH // 8, 4, 2).permute(0, 2, 1, 3).reshape(ROWS, LENGTH)
    for i in tl.static_range(LOG_K):
        for j in tl.static_range(i + 1):
            x = _compare(x, 1 << (i - j), 2 << i)
    for i in tl.static_range(LOG_LENGTH - LOG_K):
        # A descending and an ascending run: the larger ones of opposite places are the K largest of both, bitonic.
        x = tl.max(x.reshape(ROWS, (LENGTH // K) >> (i + 1), 2, K), axis=2).reshape(ROWS, LENGTH >> (i + 1))
        for j in tl.static_range(LOG_K):
            x = _compare(x, K >> (j + 1), K)
    return x


@triton.jit
def _pack(flags):
    """Flags of 0 and 1, one bit each: flag p of a row becomes bit p % 32 of its word p // 32."""
    return tl.sum(flags.reshape(flags.shape[0], flags.shape[1] // 32, 32) << tl.arange(0, 32)[None, None, :], 2)


@triton.jit
def _first(words, count):
    """The first count[row] of the bits that are set in the words of every row."""
    ones = tl.zeros_like(words)
    for bit in range(32):
        ones += (words >> bit) & 1
    room = count[:, None] - (tl.cumsum(ones, 1) - ones)
    kept = tl.zeros_like(words)
    for bit in range(32):
        one = (words >> bit) & 1
        kept |= tl.where(room > 0, one, 0) << bit
        room -= one
    return kept


@triton.jit
def _forward_kernel(
    patches, prompts, values, selected, k,
    C, P, D,
    stride_patches_b, stride_patches_p, stride_patches_d, stride_prompts_c, stride_prompts_d,
    stride_values_b, stride_selected_b,
    SCALES: tl.constexpr, LOG_K: tl.constexpr, DOT: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr, LOG_BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Values and selection bits of one prompt, for BLOCK_C classes and one image."""
    BLOCK_P: tl.constexpr = 1 << LOG_BLOCK_P
    tiles = tl.cdiv(C, BLOCK_C)
    b = (tl.program_id(0) // tiles).to(INDEX)
    c = (tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)).to(INDEX)
    p = tl.arange(0, BLOCK_P)
    patches += b * stride_patches_b + p[None, :].to(INDEX) * stride_patches_p
    prompts += c[:, None] * stride_prompts_c
    scores = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D).to(INDEX)
        left = tl.load(prompts + d[None, :] * stride_prompts_d, mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)
        right = tl.load(patches + d[:, None] * stride_patches_d, mask=(p < P)[None, :] & (d < D)[:, None], other=0.0)
        scores = tl.dot(left.to(DOT), right.to(DOT), scores, input_precision="ieee")
    scores = tl.where((p < P)[None, :], scores, float("-inf"))

    top = _largest(scores, LOG_K, LOG_BLOCK_P)
    rank = tl.arange(0, 1 << LOG_K)[None, :]
    mean = tl.zeros((BLOCK_C,), tl.float32)
    word = tl.arange(0, BLOCK_P // 32)[None, :]
    for s in tl.static_range(SCALES):
        mean += tl.sum(tl.where(rank < k[s], top, 0.0), 1) / k[s]
        last = tl.sum(tl.where(rank == k[s] - 1, top, 0.0), 1)
        chosen = ((scores >= last[:, None]) & (p < P)[None, :]).to(tl.int32)
        bits = _pack(chosen)
        if tl.max(tl.sum(chosen, 1), 0) > k[s]:
            # Some row has more patches equal to its last one than it may take: it takes the first of them.
            tied = _pack((scores == last[:, None]).to(tl.int32)) & bits
            room = k[s] - tl.sum((top > last[:, None]).to(tl.int32), 1)
            bits = (bits ^ tied) | _first(tied, room)
        row = selected + b * stride_selected_b + (s * C + c)[:, None] * tl.cdiv(P, 32)
        tl.store(row + word, bits, mask=(c < C)[:, None] & (word < tl.cdiv(P, 32)))
    tl.store(values + b * stride_values_b + c, mean / SCALES, mask=c < C)


@triton.jit
def _similarity_grad(level_grad, selected, bn, c, p, C, P, SCALES: tl.constexpr):
    """The gradient of the similarity at row bn = b * N + n, classes c and patches p, which broadcast to a tile."""
    result = tl.zeros((c + p).shape, tl.float32)
    inside = (c < C) & (p < P)
    for s in tl.static_range(SCALES):
        row = (bn * SCALES + s) * C + c
        word = tl.load(selected + row * tl.cdiv(P, 32) + p // 32, mask=inside, other=0)
        weight = tl.load(level_grad + row, mask=c < C, other=0.0)
        result += tl.where((word >> (p % 32)) & 1 != 0, weight, 0.0)
    return result


@triton.jit
def _grad_patches_kernel(
    level_grad, selected, prompts, result,
    N, C, P, D,
    stride_prompts_n, stride_prompts_c, stride_prompts_d,
    SCALES: tl.constexpr, DOT: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_P x BLOCK_D of the gradient of one image's patches: a sum over prompts and classes."""
    tiles = tl.cdiv(P, BLOCK_P)
    b = (tl.program_id(0) // tiles).to(INDEX)
    p = (tl.program_id(0) % tiles * BLOCK_P + tl.arange(0, BLOCK_P)).to(INDEX)
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(INDEX)
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    bn = b * N
    for _ in range(N):
        for start in range(0, C, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C).to(INDEX)
            left = _similarity_grad(level_grad, selected, bn, c[None, :], p[:, None], C, P, SCALES)
            address = prompts + c[:, None] * stride_prompts_c + d[None, :] * stride_prompts_d
            right = tl.load(address, mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)
            total = tl.dot(left.to(DOT), right.to(DOT), total, input_precision="ieee")
        prompts += stride_prompts_n
        bn += 1
    address = result + (b * P + p[:, None]) * D + d[None, :]
    tl.store(address, total.to(result.dtype.element_ty), mask=(p < P)[:, None] & (d < D)[None, :])


@triton.jit
def _grad_prompts_kernel(
    level_grad, selected, patches, result,
    B, N, C, P, D,
    stride_patches_b, stride_patches_p, stride_patches_d,
    SCALES: tl.constexpr, DOT: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_C x BLOCK_D of the gradient of one prompt's classes: a sum over images and patches."""
    tiles = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // tiles).to(INDEX)
    c = (tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)).to(INDEX)
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(INDEX)
    total = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    bn = n
    for _ in range(B):
        for start in range(0, P, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P).to(INDEX)
            left = _similarity_grad(level_grad, selected, bn, c[:, None], p[None, :], C, P, SCALES)
            address = patches + p[:, None] * stride_patches_p + d[None, :] * stride_patches_d
            right = tl.load(address, mask=(p < P)[:, None] & (d < D)[None, :], other=0.0)
            total = tl.dot(left.to(DOT), right.to(DOT), total, input_precision="ieee")
        patches += stride_patches_b
        bn += N
    address = result + (n * C + c[:, None]) * D + d[None, :]
    tl.store(address, total.to(result.dtype.element_ty), mask=(c < C)[:, None] & (d < D)[None, :])


def why_not(device: torch.device, dtype: torch.dtype | None = None, P: int = 1) -> str | None:
    """The reason why these kernels cannot take such inputs, or None."""
    if not triton.knobs.runtime.interpret:
        if device.type != "cuda":
            return f"the kernels run on CUDA and ROCm devices, not on {device.type}"
        if not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
            return "the kernels need compute capability 8.0 or higher"
    if dtype is not None and dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {dtype}"
    if torch.version.hip and dtype == torch.float32 and P > 512:
        return f"float32 with {P} patches needs more shared memory than ROCm devices have"
    if P > MAX_PATCHES:
        return f"the kernels take at most {MAX_PATCHES} patches, not {P}"
    return None


def saved_size(B: int, P: int, C: int, k: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of what is kept for the backward pass: one bit per patch and scale."""
    return (B, sum(map(len, k)), C, (P + 31) // 32), torch.int32


def forward(patches: Tensor, prompts: Tensor, k: Sequence[Sequence[int]], keep: bool) -> tuple[Tensor, Tensor]:
    """The values and the packed selection of patches (B, P, D) for prompts (N, C, D), with the S scales of each in k.

    Returns:
        values (B, N, C) float32 and selected (B, N * S, C, ceil(P / 32)) int32, where bit p % 32 of word p // 32 says
        whether patch p was selected.
    """
    (B, P, D), (N, C, _), S = patches.shape, prompts.shape, len(k[0])
    values = torch.empty(B, N, C, dtype=torch.float32, device=patches.device)
    selected = torch.empty(saved_size(B, P, C, k)[0], dtype=torch.int32, device=patches.device)
    if values.numel() == 0:
        return values, selected
    blocks = forward_blocks(P, patches.dtype)
    # One launch a prompt: K, the length of the sorted run, is a constant of the kernel and the main part of its cost.
    for n, scales in enumerate(k):
        _forward_kernel[(B * triton.cdiv(C, blocks["BLOCK_C"]),)](
            patches, prompts[n], values[:, n], selected[:, n * S :], tuple(scales),
            C, P, D, *patches.stride(), *prompts.stride()[1:], values.stride(0), selected.stride(0),
            SCALES=S, LOG_K=(max(scales) - 1).bit_length(), DOT=_dot_dtype(patches.dtype),
            INDEX=_index_dtype(patches, prompts, values, selected), **blocks,
        )  # fmt: skip
    return values, selected if keep else selected.new_empty(0)


def grad_patches(grad: Tensor, prompts: Tensor, selected: Tensor, k: Sequence[Sequence[int]], P: int) -> Tensor:
    """The gradient (B, P, D) in the inputs' dtype, from that of the values (B, N, C)."""
    B, (N, C, D) = len(grad), prompts.shape
    result = torch.empty(B, P, D, dtype=prompts.dtype, device=prompts.device)
    if result.numel() == 0:
        return result
    blocks = backward_blocks(prompts.dtype)
    _grad_patches_kernel[(B * triton.cdiv(P, blocks["BLOCK_P"]), triton.cdiv(D, blocks["BLOCK_D"]))](
        _level_grad(grad, k), selected, prompts, result, N, C, P, D, *prompts.stride(),
        SCALES=len(k[0]), DOT=_dot_dtype(prompts.dtype), INDEX=_index_dtype(prompts, result, selected), **blocks,
    )  # fmt: skip
    return result


def grad_prompts(grad: Tensor, patches: Tensor, selected: Tensor, k: Sequence[Sequence[int]]) -> Tensor:
    """The gradient (N, C, D) in the inputs' dtype, from that of the values (B, N, C)."""
    (B, P, D), (_, N, C) = patches.shape, grad.shape
    result = torch.empty(N, C, D, dtype=patches.dtype, device=patches.device)
    if result.numel() == 0:
        return result
    blocks = backward_blocks(patches.dtype)
    _grad_prompts_kernel[(N * triton.cdiv(C, blocks["BLOCK_C"]), triton.cdiv(D, blocks["BLOCK_D"]))](
        _level_grad(grad, k), selected, patches, result, B, N, C, P, D, *patches.stride(),
        SCALES=len(k[0]), DOT=_dot_dtype(patches.dtype), INDEX=_index_dtype(patches, result, selected), **blocks,
    )  # fmt: skip
    return result


def forward_blocks(P: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and warps of the forward kernel.

    All patches of an image are in the tile. 16384 scores are 64 registers in each thread of 8 warps, and the network
    needs as many again: with 128 (4 warps) it spills on sm_80 and sm_100. Half of that is left where a float32 product
    (no tensor cores, operands in registers) or more than 512 patches need more. BLOCK_D keeps the patches' block within
    half of the 64 KiB of shared memory that gfx942 has, except for float32 above 512 patches.
    """
    log_block_p = max(5, (P - 1).bit_length())
    scores = 16384 if dtype.itemsize == 2 and P <= 512 else 8192
    block_c, block_d = min(64, scores >> log_block_p), max(16, min(32, (32768 // dtype.itemsize) >> log_block_p))
    return {"BLOCK_C": block_c, "LOG_BLOCK_P": log_block_p, "BLOCK_D": block_d, "num_warps": 8, "num_stages": 2}


def backward_blocks(dtype: torch.dtype) -> dict[str, int]:
    """Tile sizes and warps of both backward kernels: as large as the registers of every target allow."""
    block = 64 if dtype.itemsize == 2 else 32
    return {"BLOCK_C": block, "BLOCK_P": block, "BLOCK_D": block, "num_warps": 4, "num_stages": 2}


def _level_grad(grad: Tensor, k: Sequence[Sequence[int]]) -> Tensor:
    """(B, N * S, C) float32: what every selected patch of a scale receives. Divided here, where no table is copied."""
    S = len(k[0])
    return torch.stack([grad[:, n] / (scale * S) for n, scales in enumerate(k) for scale in scales], dim=1)


def _dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype of the products' operands: that of the inputs.

    Triton's interpreter multiplies the bit patterns of bfloat16 as integers, so there the operands become float32.
    """
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def _index_dtype(*tensors: Tensor) -> tl.dtype:
    """int64 if an element of any tensor lies 2^31 or more elements from its first, int32 otherwise: it is cheaper."""
    reach = max(sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) for t in tensors)
    return tl.int64 if reach >= 2**31 else tl.int32

"""The backward kernels of topk_similarity: two matrix products with the gradient of the similarity.

That gradient is never in memory. Its tiles are made in registers, from the selection bits and one number for each row
of the similarity, and go into the product as its left operand. Sums have a fixed order and nothing is added atomically.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N", "C", "P"])
def grad_patches_kernel(
    level_grad, selected, prompts, result,
    N, C, P, D,
    stride_prompts_n, stride_prompts_c, stride_prompts_d,
    SCALES: tl.constexpr, DOT: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_P x BLOCK_D of the gradient of one image's patches: a sum over prompts and classes."""
    tiles = tl.cdiv(P, BLOCK_P)
    b = (tl.program_id(0) // tiles).to(INDEX)
    block = tl.program_id(0) % tiles
    p = (block * BLOCK_P + tl.arange(0, BLOCK_P)).to(INDEX)
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(INDEX)
    word, bit = tl.arange(0, 4), 2 * tl.arange(0, BLOCK_P // 8)[:, None, None] + tl.arange(0, 2)[None, None, :]
    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    steps = tl.cdiv(C, BLOCK_C)
    for step in range(N * steps):
        n, c = step // steps, step % steps * BLOCK_C + tl.arange(0, BLOCK_C)
        left = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
        for s in tl.static_range(SCALES):
            row = ((b * N + n) * SCALES + s) * C + c
            address = selected + (row[None, :] * tl.cdiv(P, 128) + block * BLOCK_P // 128) * 4 + word[:, None]
            words = tl.load(address, mask=(c < C)[None, :], other=0)
            flags = (words[None, :, None, :] >> (block * BLOCK_P % 128 // 4 + bit)[:, :, :, None]) & 1
            weight = tl.load(level_grad + row, mask=c < C, other=0.0)
            left += tl.where(flags.reshape(BLOCK_P, BLOCK_C) != 0, weight[None, :], 0.0)
        address = prompts + n.to(INDEX) * stride_prompts_n + c.to(INDEX)[:, None] * stride_prompts_c
        right = tl.load(address + d[None, :] * stride_prompts_d, mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)
        total = tl.dot(left.to(DOT), right.to(DOT), total, input_precision="ieee")
    address = result + (b * P + p[:, None]) * D + d[None, :]
    tl.store(address, total.to(result.dtype.element_ty), mask=(p < P)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=["B", "N", "C", "P", "images"])
def grad_prompts_kernel(
    level_grad, selected, patches, partial,
    B, N, C, P, D, images,
    stride_patches_b, stride_patches_p, stride_patches_d,
    SCALES: tl.constexpr, DOT: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_C x BLOCK_D of the gradient of one prompt's classes: a sum over patches and the images of one part."""
    tiles = tl.cdiv(C, BLOCK_C)
    n = (tl.program_id(0) // tiles).to(INDEX)
    c = (tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)).to(INDEX)
    d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(INDEX)
    part = tl.program_id(2)
    word, bit = tl.arange(0, 4), 2 * tl.arange(0, BLOCK_P // 8)[:, None, None] + tl.arange(0, 2)[None, None, :]
    total = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    steps = tl.cdiv(P, BLOCK_P)
    for step in range(part * images * steps, tl.minimum((part + 1) * images, B) * steps):
        b, start = (step // steps).to(INDEX), step % steps * BLOCK_P
        left = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
        for s in tl.static_range(SCALES):
            row = ((b * N + n) * SCALES + s) * C + c
            address = selected + (row[:, None] * tl.cdiv(P, 128) + start // 128) * 4 + word[None, :]
            words = tl.load(address, mask=(c < C)[:, None], other=0)
            flags = (words[:, None, :, None] >> (start % 128 // 4 + bit)[None, :, :, :]) & 1
            weight = tl.load(level_grad + row, mask=c < C, other=0.0)
            left += tl.where(flags.reshape(BLOCK_C, BLOCK_P) != 0, weight[:, None], 0.0)
        p = start + tl.arange(0, BLOCK_P)
        address = patches + b * stride_patches_b + p.to(INDEX)[:, None] * stride_patches_p
        right = tl.load(address + d[None, :] * stride_patches_d, mask=(p < P)[:, None] & (d < D)[None, :], other=0.0)
        total = tl.dot(left.to(DOT), right.to(DOT), total, input_precision="ieee")
    address = partial + ((part * N + n) * C + c[:, None]) * D + d[None, :]
    tl.store(address, total.to(partial.dtype.element_ty), mask=(c < C)[:, None] & (d < D)[None, :])

"""The yardstick of the forward kernel of topk_similarity: the same product, of which only the row maximum is kept."""

import triton
import triton.language as tl
from fastprompt_kernels.topk_similarity.triton_forward import similarity


@triton.jit(do_not_specialize=["B", "C", "P", "stride_values_b"], do_not_specialize_on_alignment=["values"])
def row_maximum_kernel(
    patches, prompts, values,
    B, C, P, D,
    stride_patches_b, stride_patches_p, stride_patches_d, stride_prompts_c, stride_prompts_d, stride_values_b,
    DOT: tl.constexpr, INDEX: tl.constexpr, LOG_ROW: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The largest similarity of one prompt, BLOCK_C classes and BLOCK_P >> LOG_ROW images."""
    IMAGES: tl.constexpr = BLOCK_P >> LOG_ROW
    tiles = tl.cdiv(C, BLOCK_C)
    first_image = tl.program_id(0) // tiles * IMAGES
    c = tl.program_id(0) % tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    scores = similarity(
        patches, prompts, c, 0, first_image, B, C, P, D,
        stride_patches_b, stride_patches_p, stride_patches_d, stride_prompts_c, stride_prompts_d,
        LOG_ROW, DOT, INDEX, BLOCK_P, BLOCK_D,
    )  # fmt: skip
    b = (first_image + tl.arange(0, IMAGES)).to(INDEX)[None, :]
    address = values + b * stride_values_b + c.to(INDEX)[:, None]
    tl.store(address, tl.max(scores.reshape(BLOCK_C, IMAGES, 1 << LOG_ROW), 2), mask=(b < B) & (c < C)[:, None])

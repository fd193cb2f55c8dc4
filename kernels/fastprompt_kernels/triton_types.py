"""The types that Triton kernels are launched with. Imports triton, so only modules of kernels may import it."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype of the products' operands: that of the inputs.

    Triton's interpreter multiplies the bit patterns of bfloat16 as integers, so there the operands become float32.
    """
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def index_dtype(*tensors: Tensor) -> tl.dtype:
    """int64 if an element of any tensor lies 2^31 or more elements from its first, int32 otherwise: it is cheaper."""
    reach = max(sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) for t in tensors)
    return tl.int64 if reach >= 2**31 else tl.int32

"""What every operation asks when it launches Triton kernels. Imports triton: only modules of kernels import it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# An offset that int32 does not hold.
INT32_REACH = 2**31
# The most programs that share out a sum: two for each of the 132 processors of the largest GPU that the tiles were
# chosen for. It bounds the memory for partial sums to 264 tiles, 35 MB.
PROGRAMS = 264


def _let_loops_end_at_arrays() -> None:
    """Let Triton 3.6's interpreter take the one element of an array for a number, as later versions do.

    It asks for the int of an array (1,), which NumPy has refused since 2.4.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_also(tensor: type, scope: object) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_also


if triton.knobs.runtime.interpret and triton.__version__.startswith("3.6."):
    _let_loops_end_at_arrays()


def why_not(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """The reason why kernels cannot take such inputs, or None."""
    if not triton.knobs.runtime.interpret:
        if device.type != "cuda":
            return f"the kernels run on CUDA and ROCm devices, not on {device.type}"
        if not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
            return "the kernels need compute capability 8.0 or higher"
    if dtype is not None and dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels take float32, float16 and bfloat16, not {dtype}"
    return None


def architecture(device: torch.device) -> str:
    """The target among those of the launch tables whose tensor cores work like those of the device."""
    if device.type != "cuda":  # Triton's interpreter
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    return {9: "sm_90", 10: "sm_100"}.get(torch.cuda.get_device_capability(device)[0], "sm_80")


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """The dtype of the products' operands: that of the inputs.

    Triton's interpreter multiplies the bit patterns of bfloat16 as integers, so there the operands become float32.
    """
    if dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return tl.float32
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def parts_of_a_sum(tiles: int) -> int:
    """Into how many parts the sum of every one of so many tiles is cut: PROGRAMS parts together at most, or one each.

    Every part is the work of one program. They are added in the end, always in the same order.
    """
    return max(1, PROGRAMS // max(1, tiles))


def index_dtype(*tensors: Tensor) -> tl.dtype:
    """int64 if an element of any tensor lies INT32_REACH or more elements from its first, else int32: it is cheaper."""
    reach = max(sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) for t in tensors)
    return tl.int64 if reach >= INT32_REACH else tl.int32

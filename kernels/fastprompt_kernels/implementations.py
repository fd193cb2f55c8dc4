"""Which implementation of an operation runs, and on inputs of which dtype."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor

IMPLEMENTATIONS = ("auto", "reference", "blocked", "triton")


def check_name(impl: str, names: Sequence[str] = IMPLEMENTATIONS) -> None:
    """Raise ValueError unless this is the name of an implementation."""
    if impl not in names:
        raise ValueError(f"impl must be one of {', '.join(map(repr, names))}, got {impl!r}")


def available_implementations(device: torch.device | str) -> dict[str, str]:
    """For every implementation "usable", or the reason why it cannot run on this device."""
    return {
        "reference": "usable",
        "dense": "usable",
        "blocked": "usable" if torch.device(device).type == "cpu" else "made for the CPU",
        "triton": why_not_triton(torch.device(device)) or "usable",
    }


def why_not_triton(device: torch.device, dtype: torch.dtype | None = None) -> str | None:
    """The reason why Triton kernels cannot take such inputs, or None where they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    from .triton_launch import why_not

    return why_not(device, dtype)


def runs_triton(impl: str, device: torch.device, dtype: torch.dtype, too_much: str | None = None) -> bool:
    """Whether a call that is not the reference's runs the Triton kernels; else it runs in plain torch.

    Args:
        impl: "auto", "dense", "blocked" or "triton".
        device: of the inputs.
        dtype: of the inputs.
        too_much: a reason why the kernels of this operation cannot take such arguments, whatever the device.

    Raises:
        ValueError: the kernels were asked for by name and cannot run.
    """
    if impl in ("dense", "blocked") or (impl == "auto" and device.type == "cpu"):
        return False
    reason = why_not_triton(device, dtype) or too_much
    if reason is not None and impl == "triton":
        raise ValueError(f"impl='triton' cannot run here: {reason}")
    return reason is None


def on_its_device(kernel: Callable) -> Callable:
    """Run a function while the device of its first tensor is the current one, on which Triton launches kernels.

    What Triton fails with becomes a RuntimeError of one sentence that says what to do.
    """

    @wraps(kernel)
    def run(*args, **kwargs):  # noqa: ANN002, ANN003, ANN202
        with torch.cuda.device_of(next(arg for arg in args if isinstance(arg, Tensor))):
            try:
                return kernel(*args, **kwargs)
            except Exception as error:
                if not _is_tritons(error):
                    raise
                operation, said = kernel.__module__.split(".")[-2], " ".join(str(error).split())[-120:]
                raise RuntimeError(
                    f"Triton {version('triton')} fails to run the kernels of {operation} here "
                    f"({type(error).__name__}: {said}): name another impl, or install another Triton"
                ) from error

    return run


def _is_tritons(error: Exception) -> bool:
    """Whether an error came out of Triton's compiler or launcher; its passes raise a plain RuntimeError."""
    return type(error).__module__.split(".")[0] == "triton" or "PassManager" in str(error)


def cast_by_autocast(*inputs: Tensor) -> tuple[Tensor, ...]:
    """The inputs in autocast's dtype where autocast is on; it leaves float64 alone, as everywhere in torch."""
    device = inputs[0].device.type
    if not _has_autocast(device) or not torch.is_autocast_enabled(device) or inputs[0].dtype == torch.float64:
        return inputs
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in inputs)


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which products keep the dtype of their operands, whether autocast is on or not."""
    return torch.autocast(device.type, enabled=False) if _has_autocast(device.type) else nullcontext()


def _has_autocast(device: str) -> bool:
    """Whether torch can be asked about autocast there: the meta device has none, and raises.

    Torch's own question, is_autocast_available, cannot be compiled by torch 2.11.
    """
    return device != "meta"

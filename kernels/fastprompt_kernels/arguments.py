"""Checks of arguments that several operations share."""

from torch import Tensor


def check_features(patches: Tensor, others: Tensor, *, name: str, axes: str) -> None:
    """Check patches (B, P, D) and the features that they are compared with.

    Args:
        patches: (B, P, D).
        others: the other features, whose last axis is D.
        name: of the argument `others`.
        axes: its shape, such as "(C, D)"; its first axis must not be empty.

    Raises:
        TypeError: one is not a floating-point tensor, or the dtypes differ.
        ValueError: shapes or devices do not fit.
    """
    for argument, tensor, expected, filled in (("patches", patches, "(B, P, D)", 1), (name, others, axes, 0)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{argument} must be a floating-point tensor, got {found}")
        if tensor.ndim != expected.count(",") + 1 or tensor.shape[filled] == 0:
            letter = expected.strip("()").split(", ")[filled]
            raise ValueError(
                f"{argument} must have shape {expected} with {letter} at least 1, got {tuple(tensor.shape)}"
            )
    if patches.dtype != others.dtype:
        raise TypeError(f"patches and {name} must have one dtype, got {patches.dtype} and {others.dtype}")
    if patches.device != others.device:
        raise ValueError(f"patches and {name} must be on one device, got {patches.device} and {others.device}")
    if patches.shape[-1] != others.shape[-1]:
        raise ValueError(f"patches and {name} must agree in D, got {patches.shape[-1]} and {others.shape[-1]}")

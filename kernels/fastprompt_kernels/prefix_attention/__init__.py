"""prefix_attention: causal attention of packed sequences that share a prefix."""

import torch
from torch import Tensor

from ..implementations import check_name
from . import op

__all__ = ["prefix_attention"]

IMPLEMENTATIONS = ("auto", "reference", "sdpa", "blocked", "triton", "xformers")


def prefix_attention(
    tokens: Tensor,
    sequence: Tensor,
    *,
    queries: Tensor | None = None,
    slots: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Softmax attention in which every token sees the shared prefix and the earlier tokens of its own sequence.

        result[g, t, h] = sum over u of softmax over u(<q[g, t, h], k[g, u, h]> / sqrt(d)) * v[g, u, h]

    The T = S + rows * width tokens of a group are the S tokens of the prefix, and behind them rows of slots in which
    sequences are packed. u runs over the tokens that t sees: one of the prefix sees itself and those before it; one in
    a slot sees the prefix, itself, and the slots before it in its row that have the same number in `sequence`. The
    result for a sequence is what attention over [prefix, sequence] gives, but for the order of summation. The prefix
    is not copied for every sequence; its gradient is the sum over all of them, in a fixed order.

    Scores and softmax are in float32 (float64 for float64 inputs) whatever the dtype of the inputs, and the result has
    the dtype of the inputs. Under autocast the inputs are cast to autocast's dtype first. Only the inputs are kept for
    the backward pass (not by "reference", "sdpa" and "xformers", which are differentiated by autograd). The gradient
    cannot be differentiated again, except through the reference.

    Args:
        tokens: (G, T, 3, H, d), queries, keys and values of H heads, as a joint projection gives them. With `queries`
            (G, T, 2, H, d), keys and values.
        sequence: (rows, width) integers: slots of the same number in a row are a sequence. An empty slot has a number
            that no other slot of its row has. What stands in it must be finite.
        queries: (G, rows * E, H, d), where only some slots ask: row after row, E of each. Equal ones may repeat.
        slots: (rows, E) integers from 0 to width - 1: in which slots of their rows the queries stand. Given with
            `queries` only. Where the tensor is compiled or not on the CPU it is not checked, because that would wait
            for the device.
        impl: "reference" (plain torch, the definition), "sdpa" (torch's scaled_dot_product_attention, any device),
            "blocked" (plain torch, bounded memory, any device), "triton" (fused kernels: CUDA and ROCm, float16 and
            bfloat16, S, width and d up to 64), "xformers" (its attention of blocks where it is installed, CUDA and
            ROCm, to measure against; it does not compile), or "auto": triton where it can run, else blocked. What is
            named explicitly is run or refused, never replaced.

    Returns:
        (G, T, H * d), or (G, rows * E, H * d) with `queries`.

    Raises:
        TypeError: an argument is not of the kind named above, or the two dtypes differ.
        ValueError: shapes, devices or slots do not fit, an unknown name, or an implementation that cannot run here.
    """
    _check_tokens(tokens, 3 if queries is None else 2)
    _check_integers(sequence, tokens, "sequence", "(rows, width)")
    if tokens.shape[1] <= sequence.numel():
        raise ValueError(
            f"tokens must hold a prefix and the {sequence.numel()} slots of sequence, got {tokens.shape[1]} tokens"
        )
    if (queries is None) != (slots is None):
        raise ValueError("queries and slots must be given together")
    if queries is not None:
        _check_queries(queries, slots, tokens, sequence)
    check_name(impl, IMPLEMENTATIONS)
    return op.prefix_attention(tokens, queries, sequence, slots, impl)


def _check_floats(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {found}")


def _check_tokens(tokens: Tensor, kinds: int) -> None:
    _check_floats(tokens, "tokens")
    if tokens.ndim != 5 or tokens.shape[2] != kinds or 0 in tokens.shape[3:]:
        raise ValueError(
            f"tokens must have shape (G, T, {kinds}, H, d) with H and d at least 1, got {tuple(tokens.shape)}"
        )


def _check_integers(tensor: Tensor, tokens: Tensor, name: str, axes: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.is_floating_point() or tensor.dtype == torch.bool:
        found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a tensor of integers, got {found}")
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError(f"{name} must have shape {axes} and not be empty, got {tuple(tensor.shape)}")
    if tensor.device != tokens.device:
        raise ValueError(f"tokens and {name} must be on one device, got {tokens.device} and {tensor.device}")


def _check_queries(queries: Tensor, slots: Tensor, tokens: Tensor, sequence: Tensor) -> None:
    _check_floats(queries, "queries")
    _check_integers(slots, tokens, "slots", "(rows, E)")
    if queries.dtype != tokens.dtype:
        raise TypeError(f"tokens and queries must have one dtype, got {tokens.dtype} and {queries.dtype}")
    if queries.device != tokens.device:
        raise ValueError(f"tokens and queries must be on one device, got {tokens.device} and {queries.device}")
    (rows, width), (G, _, _, H, d) = sequence.shape, tokens.shape
    if slots.shape[0] != rows:
        raise ValueError(f"slots must have one row for each of the {rows} of sequence, got {slots.shape[0]}")
    expected = (G, slots.numel(), H, d)
    if queries.shape != expected:
        raise ValueError(f"queries must have shape {expected}, got {tuple(queries.shape)}")
    checked = slots.device.type == "cpu" and not torch.compiler.is_compiling()
    if checked and ((slots < 0) | (slots >= width)).any():
        raise ValueError(f"slots must lie between 0 and {width - 1}, got {slots.min()} to {slots.max()}")

"""The definition of prefix_attention, and the oracle of its tests."""

import torch
from torch import Tensor


def prefix_attention(tokens: Tensor, queries: Tensor | None, sequence: Tensor, slots: Tensor | None) -> Tensor:
    """The formula in plain torch with a mask over all tokens, differentiable by autograd any number of times.

    Args:
        tokens: (G, T, 3, H, d), or (G, T, 2, H, d) with queries.
        queries: (G, rows * E, H, d), or None.
        sequence: (rows, width) integers.
        slots: (rows, E) integers, or None without queries.

    Returns:
        (G, T, H * d), or (G, rows * E, H * d) with queries, in the dtype of the inputs.
    """
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    (rows, width), T = sequence.shape, tokens.shape[1]
    shared = T - rows * width
    visible = visible_tokens(sequence, shared)
    if slots is not None:
        row = torch.arange(rows, device=slots.device)[:, None]
        visible = visible[(shared + row * width + slots).flatten()]
    q = (tokens[:, :, 0] if queries is None else queries).to(dtype)
    k, v = tokens[:, :, -2:].to(dtype).unbind(2)
    scores = torch.einsum("gqhd,gkhd->ghqk", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return torch.einsum("ghqk,gkhd->gqhd", weights, v).flatten(2).to(tokens.dtype)


def visible_tokens(sequence: Tensor, shared: int) -> Tensor:
    """(T, T) bool: whether a token sees another one, in the order of the prefix and then row after row."""
    rows, width = sequence.shape
    row = torch.arange(rows, device=sequence.device).repeat_interleave(width)
    number = sequence.flatten()
    own = (row[:, None] == row) & (number[:, None] == number)
    token = torch.arange(shared + rows * width, device=sequence.device)
    visible = (token < shared).expand(len(token), -1).clone()
    visible[shared:, shared:] = own
    return visible & (token <= token[:, None])

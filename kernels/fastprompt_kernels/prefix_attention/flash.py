"""prefix_attention on a processor, by torch's fused attention: one call for all rows of all groups, in float32 inside.

The keys and values of the prefix are copied in front of every row. In half precision the copies are float32: torch's
kernel is several times slower backward in bfloat16 than in float32 (15 against 3 ms for 1152 tokens on two cores).
"""

import torch
from torch import Tensor

from .sdpa import visible_keys

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(tokens: Tensor, queries: Tensor | None, sequence: Tensor, slots: Tensor | None) -> Tensor:
    """(G, T, H * d), or (G, rows * E, H * d) with queries; the arguments are those of the reference."""
    rows, shared = len(sequence), tokens.shape[1] - sequence.numel()
    source = tokens[:, :, 0] if queries is None else queries
    result = torch.empty(source.shape, dtype=tokens.dtype)
    first = shared if queries is None else 0
    of_rows = _attend(
        _by_row(source[:, first:], rows), *_keys_values(tokens, sequence), attn_mask=_bias(tokens, sequence, slots)
    )
    _rows_of(result[:, first:], rows).copy_(_groups(of_rows[0], rows))
    if queries is None:
        of_prefix = _attend(*_prefix(tokens, shared), is_causal=True)
        result[:, :shared] = of_prefix[0].transpose(1, 2)
    return result.flatten(2)


def backward(
    grad: Tensor, tokens: Tensor, queries: Tensor | None, sequence: Tensor, slots: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of tokens and of queries, (0,) without them, from that of the result."""
    rows, shared = len(sequence), tokens.shape[1] - sequence.numel()
    source = tokens[:, :, 0] if queries is None else queries
    grad = grad.unflatten(2, source.shape[2:])
    of_tokens = torch.empty(tokens.shape, dtype=tokens.dtype)
    of_queries = torch.empty(0 if queries is None else queries.shape, dtype=tokens.dtype)
    of_source = of_tokens[:, :, 0] if queries is None else of_queries
    first = shared if queries is None else 0

    operands = _by_row(source[:, first:], rows), *_keys_values(tokens, sequence)
    bias = _bias(tokens, sequence, slots)
    outcome = _attend(*operands, attn_mask=bias)
    of_rows = _differentiate(_by_row(grad[:, first:], rows), *operands, *outcome, 0.0, False, attn_mask=bias)
    of_q, *of_kv = (_groups(of_row, rows) for of_row in of_rows)  # (G, rows, E or S + width, H, d)
    _rows_of(of_source[:, first:], rows).copy_(of_q)
    of_prefix = torch.stack([of_row[:, :, :shared].sum(1) for of_row in of_kv], 2)  # (G, S, 2, H, d)
    for kind, of_row in zip((-2, -1), of_kv, strict=True):
        _rows_of(of_tokens[:, shared:, kind], rows).copy_(of_row[:, :, shared:])
    if queries is None:
        operands = _prefix(tokens, shared)
        outcome = _attend(*operands, is_causal=True)
        own = grad[:, :shared].to(operands[0].dtype).transpose(1, 2)
        of_q, *of_kv = (of.transpose(1, 2) for of in _differentiate(own, *operands, *outcome, 0.0, True))
        of_tokens[:, :shared, 0] = of_q
        of_prefix += torch.stack(of_kv, 2)
    of_tokens[:, :shared, -2:] = of_prefix
    return of_tokens, of_queries


def _accumulator(tokens: Tensor) -> torch.dtype:
    return torch.promote_types(tokens.dtype, torch.float32)


def _rows_of(x: Tensor, rows: int) -> Tensor:
    """(G, rows * n, H, d) as (G, rows, n, H, d)."""
    return x.unflatten(1, (rows, -1))


def _by_row(x: Tensor, rows: int) -> Tensor:
    """(G, rows * n, H, d) as (G * rows, H, n, d) in the accumulator's precision."""
    return _rows_of(x, rows).to(_accumulator(x)).flatten(0, 1).transpose(1, 2)


def _groups(x: Tensor, rows: int) -> Tensor:
    """(G * rows, H, n, d) as (G, rows, n, H, d)."""
    return x.transpose(1, 2).unflatten(0, (-1, rows))


def _keys_values(tokens: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor]:
    """Each (G * rows, H, S + width, d): the prefix, and behind it what stands in the row."""
    (rows, width), (G, T, _, H, d) = sequence.shape, tokens.shape
    shared = T - rows * width
    both = torch.empty(2, G, rows, shared + width, H, d, dtype=_accumulator(tokens))
    of_kinds = tokens[:, :, -2:].permute(2, 0, 1, 3, 4)  # (2, G, T, H, d)
    both[:, :, :, :shared] = of_kinds[:, :, None, :shared]
    both[:, :, :, shared:] = of_kinds[:, :, shared:].unflatten(2, (rows, width))
    k, v = both.flatten(1, 2).transpose(2, 3)
    return k, v


def _prefix(tokens: Tensor, shared: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the prefix, each (G, H, S, d)."""
    q, k, v = tokens[:, :shared].to(_accumulator(tokens)).permute(2, 0, 3, 1, 4)
    return q, k, v


def _bias(tokens: Tensor, sequence: Tensor, slots: Tensor | None) -> Tensor:
    """(G * rows, 1, E, S + width): 0, or minus infinity where a key is not seen."""
    visible = visible_keys(sequence, slots, tokens.shape[1] - sequence.numel())
    bias = torch.zeros(visible.shape, dtype=_accumulator(tokens)).masked_fill_(~visible, -torch.inf)
    return bias.expand(len(tokens), -1, -1, -1).flatten(0, 1)[:, None]

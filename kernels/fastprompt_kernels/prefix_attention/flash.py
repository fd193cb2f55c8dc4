"""prefix_attention on a processor, by torch's fused attention, tile by tile and in float32 inside.

A tile is some rows of some groups; the keys and values of the prefix are copied in front of each of its rows. In half
precision the copies are float32: backward, torch's kernel takes several times longer in bfloat16 (15 against 3 ms for
1152 tokens of eight heads on two cores).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .sdpa import visible_keys

SLOTS = 1024  # of a tile: enough for one call, few enough that its copies stay in the caches

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_differentiate = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(tokens: Tensor, queries: Tensor | None, sequence: Tensor, slots: Tensor | None) -> Tensor:
    """(G, T, H * d), or (G, rows * E, H * d) with queries; the arguments are those of the reference."""
    shared = tokens.shape[1] - sequence.numel()
    source = tokens[:, :, 0] if queries is None else queries
    result = torch.empty(source.shape, dtype=tokens.dtype)
    asking, answers = (_rows(x, sequence, 0 if slots is not None else shared) for x in (source, result))
    for groups, rows, bias in _tiles(tokens, sequence, slots):
        keys_values = _keys_values(tokens, sequence, groups, rows)
        attended, _ = _attend(_by_row(asking[groups, rows]), *keys_values, attn_mask=bias)
        of_tile = answers[groups, rows]
        of_tile.copy_(_like(attended, of_tile))
    if queries is None:
        result[:, :shared] = _attend(*_prefix(tokens, shared), is_causal=True)[0].transpose(1, 2)
    return result.flatten(2)


def backward(
    grad: Tensor, tokens: Tensor, queries: Tensor | None, sequence: Tensor, slots: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of tokens and of queries, (0,) without them, from that of the result."""
    shared = tokens.shape[1] - sequence.numel()
    source = tokens[:, :, 0] if queries is None else queries
    grad = grad.unflatten(2, source.shape[2:])
    of_tokens = torch.empty(tokens.shape, dtype=tokens.dtype)
    of_queries = torch.empty(0 if queries is None else queries.shape, dtype=tokens.dtype)
    of_source = of_tokens[:, :, 0] if queries is None else of_queries
    of_prefix = torch.zeros(tokens[:, :shared, -2:].shape, dtype=_accumulator(tokens))  # (G, S, 2, H, d)

    first = 0 if slots is not None else shared
    asking, above, below = (_rows(x, sequence, first) for x in (source, grad, of_source))
    of_own = _rows(of_tokens, sequence, shared)  # (G, rows, width, 3 or 2, H, d)
    for groups, rows, bias in _tiles(tokens, sequence, slots):
        operands = _by_row(asking[groups, rows]), *_keys_values(tokens, sequence, groups, rows)
        outcome = _attend(*operands, attn_mask=bias)
        of_q, *of_kv = _differentiate(_by_row(above[groups, rows]), *operands, *outcome, 0.0, False, attn_mask=bias)
        of_tile = below[groups, rows]
        of_tile.copy_(_like(of_q, of_tile))
        for kind, of_both in zip((-2, -1), of_kv, strict=True):
            own = of_own[groups, rows, :, kind]
            of_both = of_both.transpose(1, 2).unflatten(0, own.shape[:2])  # (g, r, S + width, H, d)
            own.copy_(of_both[:, :, shared:])
            of_prefix[groups, :, kind] += of_both[:, :, :shared].sum(1)
    if queries is None:
        operands = _prefix(tokens, shared)
        outcome = _attend(*operands, is_causal=True)
        own = grad[:, :shared].to(of_prefix.dtype).transpose(1, 2)
        of_q, *of_kv = (of.transpose(1, 2) for of in _differentiate(own, *operands, *outcome, 0.0, True))
        of_tokens[:, :shared, 0] = of_q
        of_prefix += torch.stack(of_kv, 2)
    of_tokens[:, :shared, -2:] = of_prefix
    return of_tokens, of_queries


def _tiles(tokens: Tensor, sequence: Tensor, slots: Tensor | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """Groups, rows and mask (g * r, 1, E, S + width) of every tile: 0, or minus infinity where a key is not seen.

    Rows are cut in the same places however many groups there are, so that sums over rows have one order.
    """
    rows, width = sequence.shape
    visible = visible_keys(sequence, slots, tokens.shape[1] - rows * width)
    bias = torch.zeros(visible.shape, dtype=_accumulator(tokens)).masked_fill_(~visible, -torch.inf)
    some_rows, some_groups = max(1, SLOTS // width), max(1, SLOTS // (rows * width))
    for group in range(0, len(tokens), some_groups):
        groups = slice(group, min(group + some_groups, len(tokens)))
        for row in range(0, rows, some_rows):
            of_rows = bias[row : row + some_rows]
            mask = of_rows.expand(groups.stop - groups.start, *of_rows.shape).flatten(0, 1)[:, None]
            yield groups, slice(row, row + len(of_rows)), mask


def _accumulator(tokens: Tensor) -> torch.dtype:
    return torch.promote_types(tokens.dtype, torch.float32)


def _rows(x: Tensor, sequence: Tensor, first: int) -> Tensor:
    """(G, first + rows * n, ...) as (G, rows, n, ...), without the first."""
    return x[:, first:].unflatten(1, (len(sequence), -1))


def _by_row(x: Tensor) -> Tensor:
    """(g, r, n, H, d) as (g * r, H, n, d) in the accumulator's precision."""
    return x.to(_accumulator(x)).flatten(0, 1).transpose(1, 2)


def _like(x: Tensor, tile: Tensor) -> Tensor:
    """(g * r, H, n, d) as (g, r, n, H, d)."""
    return x.transpose(1, 2).view(tile.shape)


def _keys_values(tokens: Tensor, sequence: Tensor, groups: slice, rows: slice) -> tuple[Tensor, Tensor]:
    """Each (g * r, H, S + width, d): the prefix, and behind it what stands in the row."""
    shared = tokens.shape[1] - sequence.numel()
    own = _rows(tokens, sequence, shared)[groups, rows, :, -2:].permute(3, 0, 1, 2, 4, 5)  # (2, g, r, width, H, d)
    both = torch.empty(*own.shape[:3], shared + own.shape[3], *own.shape[4:], dtype=_accumulator(tokens))
    both[:, :, :, :shared] = tokens[groups, :shared, -2:].permute(2, 0, 1, 3, 4)[:, :, None]
    both[:, :, :, shared:] = own
    k, v = both.flatten(1, 2).transpose(2, 3)
    return k, v


def _prefix(tokens: Tensor, shared: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of the prefix, each (G, H, S, d)."""
    q, k, v = tokens[:, :shared].to(_accumulator(tokens)).permute(2, 0, 3, 1, 4)
    return q, k, v

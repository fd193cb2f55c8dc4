"""prefix_attention in plain torch with bounded memory and its own backward, for any device.

A tile is some rows of packed sequences. The keys and values of the prefix are copied in front of each of its rows; the
scores of a tile are made by one batched product, forward and again backward, so that nothing is kept in between. The
prefix attends to itself as a row without a prefix. Products are in float32 for half-precision inputs: on a processor
its bfloat16 units are no faster with matrices this small, and torch's fused attention is slower backward.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..cores import parts
from .sdpa import visible_keys

# Slots in a tile: on a processor as many as make products worth sharing out to the cores and leave the tile in the
# caches, elsewhere as many as fill the device. Torch's own threads do the sharing, which took two thirds of the time
# that threads with a tile each took.
SLOTS = 1200
SLOTS_OF_DEVICES = 2**15


@dataclass(frozen=True)
class _Tile:
    """Some rows of some groups, or their prefix as one row."""

    groups: slice
    first: int  # token of the keys, and their number in a row
    width: int
    first_query: int  # and their number in a row
    per_row: int
    bias: Tensor  # (R, per_row, shared + width): 0, or minus infinity where a key is not seen
    shared: int  # tokens of the prefix in front of every row
    part: int  # of the sum that makes the gradient of the prefix

    def rows(self, tensor: Tensor, first: int, width: int) -> Tensor:
        """Its part of (G, tokens, H, d), as (g, R, H, width, d)."""
        own = tensor[self.groups, first : first + len(self.bias) * width]
        return own.unflatten(1, (-1, width)).transpose(2, 3)

    def queries(self, tensor: Tensor) -> Tensor:
        """Its queries, or what stands in their place, as (g, R, H, per_row, d)."""
        return self.rows(tensor, self.first_query, self.per_row)

    def prefix(self, tensor: Tensor) -> Tensor:
        """The keys or values of the prefix, (g, 1, H, S, d)."""
        return tensor[self.groups, : self.shared].transpose(1, 2)[:, None]


def forward(tokens: Tensor, queries: Tensor | None, sequence: Tensor, slots: Tensor | None) -> Tensor:
    """(G, T, H * d), or (G, rows * E, H * d) with queries; the arguments are those of the reference."""
    source = tokens[:, :, 0] if queries is None else queries
    result = torch.empty(source.shape, dtype=tokens.dtype, device=tokens.device)

    for tile in _tiles(tokens, sequence, slots):
        q, k, v = _operands(tile, source, tokens)
        of_tile = tile.queries(result)
        of_tile.copy_(torch.bmm(_probabilities(tile, q, k), v).view(of_tile.shape))
    return result.flatten(2)


def backward(
    grad: Tensor, tokens: Tensor, queries: Tensor | None, sequence: Tensor, slots: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of tokens and of queries, (0,) without them, from that of the result."""
    source = tokens[:, :, 0] if queries is None else queries
    grad = grad.unflatten(2, source.shape[2:])
    of_tokens = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    of_queries = torch.empty(0 if queries is None else queries.shape, dtype=tokens.dtype, device=tokens.device)
    of_source = of_tokens[:, :, 0] if queries is None else of_queries
    tiles = _tiles(tokens, sequence, slots)
    (G, _, _, H, d), shared = tokens.shape, tokens.shape[1] - sequence.numel()
    parts_of_prefix = 1 + max((tile.part for tile in tiles), default=0)
    of_prefix = torch.empty(parts_of_prefix, 2, G, H, shared, d, dtype=_accumulator(tokens), device=tokens.device)

    for tile in tiles:
        own = tile.queries(grad)
        of_q, of_kv = _gradients(tile, *_operands(tile, source, tokens), own.to(of_prefix.dtype).flatten(0, 2))
        tile.queries(of_source).copy_(of_q.view(own.shape))
        of_kv = of_kv.unflatten(1, own.shape[:3])
        if tile.shared == 0:
            of_prefix[tile.part, :, tile.groups] = of_kv[:, :, 0]
            continue
        torch.sum(of_kv[..., : tile.shared, :], 2, out=of_prefix[tile.part, :, tile.groups])
        for index in (0, 1):
            own_keys = tile.rows(of_tokens[:, :, index - 2], tile.first, tile.width)
            own_keys.copy_(of_kv[index, ..., tile.shared :, :])
    of_tokens[:, :shared, -2:] = of_prefix.sum(0).permute(1, 3, 0, 2, 4)
    return of_tokens, of_queries


def _accumulator(tokens: Tensor) -> torch.dtype:
    return torch.promote_types(tokens.dtype, torch.float32)


def _tiles(tokens: Tensor, sequence: Tensor, slots: Tensor | None) -> list[_Tile]:
    """All of them. Rows are cut in the same places for any number of groups, so that every sum has a fixed order."""
    (rows, width), (G, T) = sequence.shape, tokens.shape[:2]
    shared, dtype = T - rows * width, _accumulator(tokens)
    per_row = width if slots is None else slots.shape[1]
    at_once = max(1, (SLOTS if tokens.device.type == "cpu" else SLOTS_OF_DEVICES) // width)
    cuts = list(parts(rows, at_once))
    bias = _bias(visible_keys(sequence, slots, shared), dtype)
    tiles = []
    for groups in parts(G, at_once // rows):
        for part, cut in enumerate(cuts):
            first_query = cut.start * per_row + (shared if slots is None else 0)
            first = shared + cut.start * width
            tiles.append(_Tile(groups, first, width, first_query, per_row, bias[cut], shared, part))
        if slots is None:
            causal = _bias(torch.ones(1, shared, shared, dtype=torch.bool, device=tokens.device).tril(), dtype)
            tiles.append(_Tile(groups, 0, shared, 0, shared, causal, 0, len(cuts)))
    return tiles


def _bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def _operands(tile: _Tile, source: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (n, per_row, d), keys and values (n, shared + width, d) of the n rows of all groups and heads."""
    dtype = _accumulator(tokens)
    q = tile.queries(source)
    kv = torch.empty(2, *q.shape[:3], tile.shared + tile.width, q.shape[-1], dtype=dtype, device=q.device)
    for index in (0, 1):
        kv[index, ..., : tile.shared, :] = tile.prefix(tokens[:, :, index - 2])
        kv[index, ..., tile.shared :, :] = tile.rows(tokens[:, :, index - 2], tile.first, tile.width)
    return q.to(dtype).flatten(0, 2), *kv.flatten(1, 3)


def _probabilities(tile: _Tile, q: Tensor, k: Tensor) -> Tensor:
    """(n, per_row, shared + width)."""
    scores = q.new_empty(len(q), q.shape[1], k.shape[1])
    scores.view(tile.groups.stop - tile.groups.start, len(tile.bias), -1, *scores.shape[1:]).copy_(tile.bias[:, None])
    return scores.baddbmm_(q, k.mT, alpha=q.shape[-1] ** -0.5).softmax(-1)


def _gradients(tile: _Tile, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Those of q, and of k and v one behind the other.

    d scores = p * (d p - sum of p * d p)
    """
    p, scale = _probabilities(tile, q, k), q.shape[-1] ** -0.5
    of_kv = k.new_empty(2, *k.shape)
    torch.bmm(p.mT, grad, out=of_kv[1])
    of_scores = torch.ops.aten._softmax_backward_data(torch.bmm(grad, v.mT), p, -1, p.dtype)
    torch.baddbmm(of_kv[0], of_scores.mT, q, beta=0, alpha=scale, out=of_kv[0])
    return torch.baddbmm(q, of_scores, k, beta=0, alpha=scale), of_kv

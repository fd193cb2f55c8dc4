"""prefix_attention by torch's scaled_dot_product_attention: the keys of the prefix are copied in front of every row."""

import torch
import torch.nn.functional as F
from torch import Tensor


def prefix_attention(tokens: Tensor, queries: Tensor | None, sequence: Tensor, slots: Tensor | None) -> Tensor:
    """What the reference computes, of arguments as they are there, row by row.

    Differentiable as far as scaled_dot_product_attention is.
    """
    (rows, width), (G, T, _, H, _) = sequence.shape, tokens.shape
    if G == 0:  # torch 2.11 kills the process where attention has no heads
        return (tokens[:, :, 0] if queries is None else queries + tokens.sum()).flatten(2)  # in the graph of both
    shared = T - rows * width
    # Split, not sliced: the backward pass of a slice fills and adds a zero tensor of the full size.
    prefix, names = tokens.split([shared, rows * width], dim=1)
    prefix = prefix.permute(2, 0, 3, 1, 4)  # (3 or 2, G, H, S, d)
    # Groups stand beside heads, so that one mask serves all of them.
    by_row = names.unflatten(1, (rows, width)).permute(3, 1, 0, 4, 2, 5).flatten(2, 3)  # (., rows, G * H, width, d)
    k, v = (
        torch.cat([of_prefix.flatten(0, 1).expand(rows, -1, -1, -1), of_row], dim=2)
        for of_prefix, of_row in zip(prefix[-2:], by_row[-2:], strict=True)
    )
    q = by_row[0]
    if queries is not None:
        q = queries.unflatten(1, (rows, -1)).permute(1, 0, 3, 2, 4).flatten(1, 2)
    visible = visible_keys(sequence, slots, shared)[:, None]
    result = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    result = result.unflatten(1, (G, H)).permute(1, 0, 3, 2, 4).flatten(1, 2)
    if queries is None:
        of_prefix = F.scaled_dot_product_attention(*prefix, is_causal=True).transpose(1, 2)
        result = torch.cat([of_prefix, result], dim=1)
    return result.flatten(2)


def visible_keys(sequence: Tensor, slots: Tensor | None, shared: int) -> Tensor:
    """(rows, E, S + width) bool: the prefix and the slots of its row that a query in a slot sees; all slots query."""
    rows, width = sequence.shape
    slot = torch.arange(width, device=sequence.device)
    slots = slot.expand(rows, -1) if slots is None else slots.long()
    same = sequence.gather(1, slots)[:, :, None] == sequence[:, None]
    prefix = same.new_ones(rows, slots.shape[1], shared)
    return torch.cat([prefix, same & (slot <= slots[:, :, None])], dim=2)

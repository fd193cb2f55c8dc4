"""The pass of any text tower: every prompt at the full length that the tower reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.backbone.blocks import close_block, split_heads
from fastprompt.backbone.class_tokens import ClassTokens
from fastprompt.backbone.shared_prefix import append_class_tokens
from fastprompt.backbone.text_model import TextModel


def encode_full_length(
    text: TextModel, class_tokens: ClassTokens, padding: int, prefix: Tensor, before: Tensor, after: Tensor
) -> Tensor:
    """Return text features (G, C, D), not normalised, of G * C padded sequences.

    Args:
        text: of any kind.
        class_tokens: C names.
        padding: id of the token that fills a sequence up.
        prefix: (G, S, W), start and context.
        before: learned tokens in front of each name; see ``append_class_tokens``.
        after: learned tokens between name and suffix.
    """
    groups, classes = len(prefix), len(class_tokens)
    learned = before.shape[-2] + after.shape[-2]
    names = text.embed(class_tokens.ids).expand(groups, -1, -1)
    order = class_tokens.order(before.shape[-2], after.shape[-2]).to(names.device)
    names = append_class_tokens(names, before, after, classes).index_select(1, order)
    names = names.split([learned + length for length in class_tokens.lengths], dim=1)
    prefixes = prefix[:, None].expand(-1, classes, -1, -1).unbind(1)
    filling = text.embed_one(padding, groups).expand(-1, text.context_length, -1)
    rows = [torch.cat([*row, filling], dim=1)[:, : text.context_length] for row in zip(prefixes, names, strict=True)]
    x = torch.stack(rows, dim=1).flatten(0, 1) + text.positions(slice(None))
    mask = None if text.mask is None else text.mask.to(x)
    for block in text.blocks:
        q, k, v = split_heads(block, x).permute(2, 0, 3, 1, 4)  # each (G * C, heads, L, d)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = close_block(block, x, attended.transpose(1, 2).flatten(2))
    x = x.unflatten(0, (groups, classes))
    if text.reads_end_of_text:
        ends = prefix.shape[1] + learned - 1 + torch.tensor(class_tokens.lengths, device=x.device)
        return text.project(x[:, torch.arange(classes, device=x.device), ends])
    return text.project(x[:, :, 0 if text.pool == "first" else -1])

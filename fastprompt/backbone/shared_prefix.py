"""The pass of a causal text tower: every prefix is encoded once, with the names packed behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from fastprompt_kernels import prefix_attention
from torch import Tensor

from fastprompt.backbone.blocks import Block, close_block, project, split_heads
from fastprompt.backbone.class_tokens import ClassTokens
from fastprompt.backbone.packing import Packing
from fastprompt.backbone.text_model import TextModel


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class PackedNames:
    """What a pass reads beside prefixes and learned tokens of the classes.

    Attributes:
        packing: of the names together with the learned tokens of each class.
        states: embeddings: (slots, W) with positions, or (T, W) of the names alone where classes have learned tokens.
        positions: (slots, W) where classes have learned tokens.
        source: (slots,) where classes have learned tokens: the place of a slot's token among names and learned tokens.
        qkv: (slots, 3, heads, d) of the first block where they have none.
    """

    packing: Packing
    states: Tensor
    positions: Tensor | None = None
    source: Tensor | None = None
    qkv: Tensor | None = None


def embed_names(
    text: TextModel, class_tokens: ClassTokens, packing: Packing, start: int, before: int, after: int
) -> PackedNames:
    """Return packed names from position ``start`` on, with so many learned tokens before and after each name."""
    names = text.embed(class_tokens.ids)
    positions = text.positions(start + packing.position)
    if before + after:
        order = class_tokens.order(before, after).to(names.device)
        return PackedNames(packing, names, positions, order[packing.token])
    states = names.index_select(0, packing.token) + positions
    return PackedNames(packing, states, qkv=split_heads(text.blocks[0], states))


def encode_shared_prefix(text: TextModel, names: PackedNames, prefix: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Return text features (G, C, D), not normalised. Nothing is read from the host's memory.

    Args:
        text: causal.
        names: C names, packed behind prefixes and with learned tokens of these lengths.
        prefix: (G, S, W), start and context.
        before: learned tokens in front of each name; see ``append_class_tokens``.
        after: learned tokens between name and suffix.
    """
    states = names.states.expand(len(prefix), -1, -1)
    if names.source is not None:
        states = append_class_tokens(states, before, after, len(names.packing.last)).index_select(1, names.source)
        states = states + names.positions
    prefix = prefix + text.positions(slice(prefix.shape[1]))
    return text.project(end_of_text_states(text.blocks, prefix, states, names.packing, names.qkv))


def append_class_tokens(names: Tensor, before: Tensor, after: Tensor, classes: int) -> Tensor:
    """Return names (G, T, W) and behind them the learned tokens of the classes, (G, T + C * (M + A), W).

    Args:
        names: (G, T, W), the tokens of all classes, one after the other.
        before: (G, C, M, W), in front of the names, or (G, M, W) for all classes.
        after: (G, C, A, W), between name and suffix, or (G, A, W) for all classes.
        classes: C.
    """
    each = [x if x.dim() == 4 else x[:, None].expand(-1, classes, -1, -1) for x in (before, after)]
    return torch.cat([names, *(x.flatten(1, 2) for x in each)], dim=1)


def end_of_text_states(
    blocks: Sequence[Block], prefix: Tensor, names: Tensor, packing: Packing, names_qkv: Tensor | None = None
) -> Tensor:
    """Return end-of-text states (G, C, W), before the final norm, of packed names behind a prefix that they share.

    Args:
        blocks: of a causal text tower, frozen.
        prefix: (G, S, W), positions added.
        names: (G, slots, W), in the slots of the packing, positions added.
        packing: of the C names.
        names_qkv: (slots, 3, heads, d) of the names in the first block, if they are known.
    """
    x = torch.cat([prefix, names], dim=1)  # (G, S + slots, W)
    *blocks, last = blocks
    for number, block in enumerate(blocks):
        if number or names_qkv is None:
            qkv = split_heads(block, x)
        else:
            qkv = torch.cat([split_heads(block, prefix), names_qkv.expand(len(x), -1, -1, -1, -1)], dim=1)
        x = close_block(block, x, prefix_attention(qkv, packing.sequence))
    return _last_block(last, x, prefix.shape[1], packing)


def _last_block(block: Block, x: Tensor, shared: int, packing: Packing) -> Tensor:
    """Return (G, C, W): of the last block only end-of-text tokens are read, so only they ask and pass its MLP."""
    heads = (block.attn.num_heads, -1)
    ends = x.index_select(1, shared + packing.last)
    queries = project(block, ends, "q").unflatten(-1, heads).index_select(1, packing.query_class)
    keys_values = project(block, x, "kv").unflatten(-1, (2, *heads))
    attended = prefix_attention(keys_values, packing.sequence, queries=queries, slots=packing.query_slots)
    return close_block(block, ends, attended.index_select(1, packing.query))

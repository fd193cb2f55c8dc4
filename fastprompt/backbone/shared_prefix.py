"""The causal text tower as a function of contexts: every context is encoded once, and class names packed behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from fastprompt_kernels import prefix_attention
from torch import Tensor, nn

from fastprompt.backbone.blocks import close_block, project, split_heads
from fastprompt.backbone.class_tokens import ClassTokens
from fastprompt.backbone.memory import release_freed_memory
from fastprompt.backbone.packing import Packing, pack

if TYPE_CHECKING:
    from fastprompt.backbone.text import TextTower

CONSTANT_BYTES = 64 * 2**20  # what constants of lists of class names may take; larger ones are made in every pass


@dataclass(frozen=True)
class NameConstants:
    """What the first block reads of class names behind a shared context: no learned tensor has a part in it.

    Attributes:
        states: (slots, W) embeddings with positions.
        qkv: (slots, 3, heads, d) of the first block.
    """

    states: Tensor
    qkv: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.states.nbytes + self.qkv.nbytes


class ConstantCache:
    """Constants of the lists of class names used last, as many as fit into ``CONSTANT_BYTES``."""

    def __init__(self) -> None:
        self._kept: dict[tuple, NameConstants] = {}

    def get(
        self, tower: TextTower, class_tokens: ClassTokens, packing: Packing, start: int, keep: bool
    ) -> NameConstants:
        """Constants of packed names whose first token stands at position ``start``; kept for later, or not."""
        first = tower.blocks[0]
        read = (
            tower.token_embedding.weight,
            tower.positional_embedding,
            *first.ln_1.parameters(),
            first.attn.in_proj_weight,
            first.attn.in_proj_bias,
        )
        key = (class_tokens, start, *((tensor.data_ptr(), tensor.dtype, tensor._version) for tensor in read))
        constants = self._kept.pop(key, None)
        if constants is None:
            with torch.inference_mode(False), torch.no_grad():  # what is kept may serve a training later
                states = tower.embed(class_tokens.ids).index_select(0, packing.token)
                states = states + tower.positional_embedding[start + packing.position].to(states.dtype)
                constants = NameConstants(states, split_heads(first, states))
        if keep:
            self._keep(key, constants)
        return constants

    def _keep(self, key: tuple, constants: NameConstants) -> None:
        if constants.nbytes > CONSTANT_BYTES:
            return
        self._kept[key] = constants  # behind all others
        while sum(kept.nbytes for kept in self._kept.values()) > CONSTANT_BYTES:
            del self._kept[next(iter(self._kept))]


def encode_shared_prefix(
    tower: TextTower, context: Tensor, class_tokens: ClassTokens, after: Tensor, sparing: bool = False
) -> Tensor:
    """End-of-text states (G, C, W), before the final norm.

    Args:
        tower: gives embeddings and blocks.
        context: (G, M, W) or (G, C, M, W), in front of the names.
        class_tokens: the names.
        after: (G, A, W) or (G, C, A, W), between name and suffix.
        sparing: see ``EncodingPlan``; nothing is kept for the next pass then.
    """
    groups = len(context)
    own = context if context.dim() == 4 else context[:, :0]
    brought = own.shape[-2] + after.shape[-2]  # tokens that each class brings beside its name
    packing = pack(tuple(brought + length for length in class_tokens.lengths), context.device)
    start = tower.embed(torch.tensor([tower.start_of_text])).expand(groups, 1, tower.width)
    prefix = start if own is context else torch.cat([start, context], dim=1)
    shared = prefix.shape[1]
    prefix = prefix + tower.positional_embedding[:shared].to(context.dtype)
    if not brought:
        constants = tower.constants.get(tower, class_tokens, packing, shared, keep=not sparing)
        names = constants.states.expand(groups, -1, -1)
        return end_of_text_states(tower.blocks, prefix, names, packing, constants.qkv, sparing)
    tokens, order = tower.bring(own, class_tokens, after)
    positions = tower.positional_embedding[shared + packing.position].to(context.dtype)
    return end_of_text_states(
        tower.blocks, prefix, tokens.index_select(1, order[packing.token]) + positions, packing, sparing=sparing
    )


def end_of_text_states(
    blocks: Sequence[nn.Module],
    prefix: Tensor,
    names: Tensor,
    packing: Packing,
    names_qkv: Tensor | None = None,
    sparing: bool = False,
) -> Tensor:
    """End-of-text states (G, C, W), before the final norm, of packed names behind a prefix that they share.

    Args:
        blocks: of a causal text tower, frozen.
        prefix: (G, S, W), positions added.
        names: (G, slots, W), in the slots of the packing, positions added.
        packing: of the C names.
        names_qkv: (slots, 3, heads, d) of the names in the first block, if they are known.
        sparing: see ``EncodingPlan``.
    """
    x = torch.cat([prefix, names], dim=1)  # (G, S + slots, W)
    *blocks, last = blocks
    for number, block in enumerate(blocks):
        if number or names_qkv is None:
            qkv = split_heads(block, x)
        else:
            qkv = torch.cat([split_heads(block, prefix), names_qkv.expand(len(x), -1, -1, -1, -1)], dim=1)
        x = close_block(block, x, prefix_attention(qkv, packing.sequence))
        if sparing:
            release_freed_memory(x)
    return _last_block(last, x, prefix.shape[1], packing)


def _last_block(block: nn.Module, x: Tensor, shared: int, packing: Packing) -> Tensor:
    """(G, C, W): of the last block only the end-of-text tokens are read, so only they ask and pass its MLP."""
    heads = (block.attn.num_heads, -1)
    ends = x.index_select(1, shared + packing.last)
    queries = project(block, ends, "q").unflatten(-1, heads).index_select(1, packing.query_class)
    keys_values = project(block, x, "kv").unflatten(-1, (2, *heads))
    attended = prefix_attention(keys_values, packing.sequence, queries=queries, slots=packing.query_slots)
    return close_block(block, ends, attended.index_select(1, packing.query))

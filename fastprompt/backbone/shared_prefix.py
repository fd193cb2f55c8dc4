"""The causal text tower as a function of contexts: every context is encoded once, and class names packed behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from fastprompt_kernels import prefix_attention
from torch import Tensor

from fastprompt.backbone.blocks import close_block, project, split_heads
from fastprompt.backbone.class_tokens import ClassTokens
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

    def get(self, tower: TextTower, class_tokens: ClassTokens, packing: Packing, start: int) -> NameConstants:
        """Constants of packed names whose first token stands at position ``start``."""
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
        self._keep(key, constants)
        return constants

    def _keep(self, key: tuple, constants: NameConstants) -> None:
        if constants.nbytes > CONSTANT_BYTES:
            return
        self._kept[key] = constants  # behind all others
        while sum(kept.nbytes for kept in self._kept.values()) > CONSTANT_BYTES:
            del self._kept[next(iter(self._kept))]


def encode_shared_prefix(tower: TextTower, context: Tensor, class_tokens: ClassTokens) -> Tensor:
    """End-of-text states (G, C, W), before the final norm, of contexts (G, M, W) or (G, C, M, W)."""
    own = context.shape[-2] if context.dim() == 4 else 0
    packing = pack(tuple(own + length for length in class_tokens.lengths), context.device)
    groups = context.shape[0]
    start = tower.embed(torch.tensor([tower.start_of_text])).expand(groups, 1, tower.width)
    prefix = start if own else torch.cat([start, context], dim=1)
    shared = prefix.shape[1]
    prefix = prefix + tower.positional_embedding[:shared].to(context.dtype)
    if own:
        names = _behind_own_context(context, tower.embed(class_tokens.ids), packing)
        names = names + tower.positional_embedding[shared + packing.position].to(context.dtype)
    else:
        constants = tower.constants.get(tower, class_tokens, packing, shared)
        names = constants.states.expand(groups, -1, -1)
    x = torch.cat([prefix, names], dim=1)  # (G, S + slots, W)
    *blocks, last = tower.blocks
    for block in blocks:
        if block is tower.blocks[0] and not own:
            names_qkv = constants.qkv.expand(groups, -1, -1, -1, -1)
            qkv = torch.cat([split_heads(block, prefix), names_qkv], dim=1)
        else:
            qkv = split_heads(block, x)
        x = close_block(block, x, prefix_attention(qkv, packing.sequence))
    return _last_block(last, x, shared, packing)


def _last_block(block: torch.nn.Module, x: Tensor, shared: int, packing: Packing) -> Tensor:
    """(G, C, W): of the last block only the end-of-text tokens are read, so only they ask and pass its MLP."""
    heads = (block.attn.num_heads, -1)
    ends = x.index_select(1, shared + packing.last)
    queries = project(block, ends, "q").unflatten(-1, heads).index_select(1, packing.query_class)
    keys_values = project(block, x, "kv").unflatten(-1, (2, *heads))
    attended = prefix_attention(keys_values, packing.sequence, queries=queries, slots=packing.query_slots)
    return close_block(block, ends, attended.index_select(1, packing.query))


def _behind_own_context(context: Tensor, names: Tensor, packing: Packing) -> Tensor:
    """Each class's own context (G, C, M, W) in front of its name, from the (T, W) tokens of all: (G, slots, W)."""
    groups, classes, own = context.shape[:3]
    index = packing.sequence.flatten().long().clamp(min=0)  # an empty slot reads what the first one reads
    of_context = index * own + packing.position
    of_name = (classes - 1 - index) * own + packing.token
    both = torch.cat([context.flatten(1, 2), names.expand(groups, -1, -1)], dim=1)
    return both.index_select(1, torch.where(packing.position < own, of_context, of_name))

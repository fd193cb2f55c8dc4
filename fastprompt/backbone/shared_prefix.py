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


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class NameConstants:
    """What a pass reads beside the contexts: no learned tensor has a part in it.

    Attributes:
        packing: of the names with the tokens that each class brings.
        states: embeddings: (slots, W) with positions, or (T, W) of the names alone where classes bring tokens.
        positions: (slots, W) where classes bring tokens.
        source: (slots,) where classes bring tokens: the place of a slot's token among the names and what is brought.
        qkv: (slots, 3, heads, d) of the first block where they bring none.
    """

    packing: Packing
    states: Tensor
    positions: Tensor | None = None
    source: Tensor | None = None
    qkv: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors of width W."""
        wide = (tensor for tensor in (self.states, self.positions, self.qkv) if tensor is not None)
        return sum(tensor.numel() * tensor.element_size() for tensor in wide)  # nbytes knows no symbolic sizes


class ConstantCache:
    """Constants of the lists of class names used last, as many as fit into ``CONSTANT_BYTES``."""

    def __init__(self) -> None:
        self._kept: dict[tuple, NameConstants] = {}

    @torch.compiler.disable  # a look-up on the host: compiled code would be made anew for every list of names
    def get(
        self, tower: TextTower, class_tokens: ClassTokens, context: Tensor, after: Tensor, keep: bool
    ) -> NameConstants:
        """Constants of names behind such contexts, the arguments of ``TextTower.encode``; kept for later, or not."""
        before, behind = (context.shape[-2] if context.dim() == 4 else 0), after.shape[-2]
        start = 1 + context.shape[-2] - before
        first = tower.blocks[0]
        read = (
            tower.token_embedding.weight,
            tower.positional_embedding,
            *first.ln_1.parameters(),
            first.attn.in_proj_weight,
            first.attn.in_proj_bias,
        )
        weights = ((tensor.data_ptr(), tensor.dtype, tensor._version) for tensor in read)
        key = (class_tokens, start, before, behind, *weights)
        constants = self._kept.pop(key, None)
        if constants is None:
            with torch.inference_mode(False), torch.no_grad():  # what is kept may serve a training later
                constants = _constants(tower, class_tokens, start, before, behind)
        if keep:
            self._keep(key, constants)
        return constants

    @staticmethod
    def has_room(constants: NameConstants) -> bool:
        """Whether they can be kept at all; what cannot is new in every pass."""
        return constants.nbytes <= CONSTANT_BYTES

    def _keep(self, key: tuple, constants: NameConstants) -> None:
        if not self.has_room(constants):
            return
        self._kept[key] = constants  # behind all others
        while sum(kept.nbytes for kept in self._kept.values()) > CONSTANT_BYTES:
            del self._kept[next(iter(self._kept))]


def _constants(tower: TextTower, class_tokens: ClassTokens, start: int, before: int, behind: int) -> NameConstants:
    """Of names from position ``start`` on, around which each class brings so many tokens."""
    names = tower.embed(class_tokens.ids)
    packing = pack(tuple(before + length + behind for length in class_tokens.lengths), names.device)
    positions = tower.positional_embedding[start + packing.position].to(names.dtype)
    if before + behind:
        order = class_tokens.order(before, behind, names.device)
        return NameConstants(packing, names, positions, order[packing.token])
    states = names.index_select(0, packing.token) + positions
    return NameConstants(packing, states, qkv=split_heads(tower.blocks[0], states))


def encode_shared_prefix(
    tower: TextTower, context: Tensor, after: Tensor, constants: NameConstants, sparing: bool = False
) -> Tensor:
    """End-of-text states (G, C, W), before the final norm. Nothing is read from the host's memory.

    Args:
        tower: gives embeddings and blocks.
        context: (G, M, W) or (G, C, M, W), in front of the names.
        after: (G, A, W) or (G, C, A, W), between name and suffix.
        constants: of the names behind such contexts.
        sparing: see ``EncodingPlan``.
    """
    start = tower.token_embedding.weight[tower.start_of_text].expand(len(context), 1, -1)
    own, prefix = (context, start) if context.dim() == 4 else (context[:, :0], torch.cat([start, context], dim=1))
    prefix = prefix + tower.positional_embedding[: prefix.shape[1]].to(context.dtype)
    names = constants.states.expand(len(context), -1, -1)
    if constants.source is not None:
        names = bring(names, own, after, len(constants.packing.last)).index_select(1, constants.source)
        names = names + constants.positions
    return end_of_text_states(tower.blocks, prefix, names, constants.packing, constants.qkv, sparing)


def bring(names: Tensor, own: Tensor, after: Tensor, classes: int) -> Tensor:
    """Names (G, T, W) and behind them the tokens that the classes bring, (G, T + C * (M + A), W).

    Args:
        names: (G, T, W), the tokens of all classes, one after the other.
        own: (G, C, M, W), in front of the names, or (G, 0, W).
        after: (G, C, A, W), or (G, A, W) for all classes; between name and suffix.
        classes: C.
    """
    each = [x if x.dim() == 4 else x[:, None].expand(-1, classes, -1, -1) for x in (own, after)]
    return torch.cat([names, *(x.flatten(1, 2) for x in each)], dim=1)


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

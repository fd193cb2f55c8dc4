"""The frozen text tower, read as a function of learned contexts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor, nn

from fastprompt.backbone.blocks import close_block, split_heads
from fastprompt.backbone.class_tokens import ClassTokens, Packing, pack
from fastprompt.errors import InputError


class TextTower:
    """Encodes ``[start][context][class name][end]`` for G contexts and C classes with an open_clip model.

    In a causal tower nothing after the end-of-text token can reach it, and ``[start][context]`` does not depend on the
    class. So each context is encoded once, the names follow behind it without padding, packed into rows, and every
    name attends to the keys and values of its context. This is exact: only the order of summation differs from
    encoding G * C padded sequences. A tower that is not causal (SigLIP) is run at its full length.
    """

    def __init__(self, model: nn.Module, start_of_text: int | None, padding: int) -> None:
        tower = getattr(model, "text", model)
        self._check(tower)
        self.blocks = tower.transformer.resblocks
        self.token_embedding = tower.token_embedding
        self.positional_embedding = tower.positional_embedding
        self.final_norm = tower.ln_final
        self.projection = tower.text_projection
        self.pool_type = getattr(tower, "text_pool_type", None) or tower.pool_type
        self.context_length = tower.context_length
        self.width = tower.positional_embedding.shape[1]
        self.start_of_text = start_of_text
        self.padding = padding
        self.attn_mask = tower.attn_mask
        self.shares_prefix = self.attn_mask is not None and self.pool_type in ("argmax", "eos")

    @staticmethod
    def _check(tower: nn.Module) -> None:
        blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
        if blocks is None or any(type(block) is not ResidualAttentionBlock for block in blocks):
            raise InputError(f"text tower {type(tower).__name__} is not an open_clip text transformer of plain blocks")
        if getattr(tower, "cls_emb", None) is not None:
            raise InputError("text towers with an appended class embedding (CoCa) are not supported")
        if getattr(tower, "use_pad_mask", False):
            raise InputError("text towers that mask their padding are not supported")

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings (..., W) of token ids, in the precision of the tower."""
        return F.embedding(ids.to(self.token_embedding.weight.device), self.token_embedding.weight)

    def check_fits(self, context_tokens: int, class_tokens: ClassTokens) -> None:
        """Raise ``InputError`` if a class name does not fit behind the start of text and that many context tokens."""
        class_tokens.check_fits((self.start_of_text is not None) + context_tokens, self.context_length)

    def encode(self, context: Tensor, class_tokens: ClassTokens) -> Tensor:
        """Text features (G, C, D), not normalised, of contexts (G, M, W) or (G, C, M, W)."""
        context = context.to(self.token_embedding.weight.dtype)
        self.check_fits(context.shape[-2], class_tokens)
        if not self.shares_prefix:
            return self._project(self._encode_full_length(context, class_tokens))
        return self._project(self._encode_shared_prefix(context, class_tokens))

    def _project(self, x: Tensor) -> Tensor:
        x = self.final_norm(x)
        if self.projection is None:
            return x
        return self.projection(x) if isinstance(self.projection, nn.Linear) else x @ self.projection

    # ------------------------------------------------------------------ causal towers

    def _encode_shared_prefix(self, context: Tensor, class_tokens: ClassTokens) -> Tensor:
        """End-of-text states (G, C, W)."""
        prefix, names, packing = self._layout(context, class_tokens)
        shared = prefix.shape[1]
        x = torch.cat([prefix, names], dim=1)  # (G, S + rows * width, W)
        open_prefix = packing.visible.new_ones(packing.rows, packing.width, shared)
        visible = torch.cat([open_prefix, packing.visible], dim=2)[:, None]  # (rows, 1, width, S + width)
        *blocks, last = self.blocks
        for block in blocks:
            x = close_block(block, x, _prefix_attention(block, x, shared, packing, visible))
        # Of the last block only the end-of-text tokens are read, so only they go through its projection and MLP.
        ends = shared + packing.last
        attended = _prefix_attention(last, x, shared, packing, visible)
        return close_block(last, x.index_select(1, ends), attended.index_select(1, ends))

    def _layout(self, context: Tensor, class_tokens: ClassTokens) -> tuple[Tensor, Tensor, Packing]:
        """The shared prefix (G, S, W), what follows it in packed slots (G, rows * width, W), and the packing."""
        groups, own = context.shape[0], context.shape[-2] if context.dim() == 4 else 0
        device = context.device
        start = self.embed(torch.tensor([self.start_of_text])).expand(groups, 1, self.width)
        prefix = start if own else torch.cat([start, context], dim=1)
        prefix = prefix + self.positional_embedding[: prefix.shape[1]].to(context.dtype)

        packing = pack(tuple(own + length for length in class_tokens.lengths), device)
        names = self.embed(class_tokens.ids)  # (T, W)
        follow = _behind_own_context(context, names, class_tokens.lengths) if own else names.expand(groups, -1, -1)
        positions = self.positional_embedding[prefix.shape[1] + packing.position].to(context.dtype)
        return prefix, follow.index_select(1, packing.token) + positions, packing

    # ------------------------------------------------------------------ other towers

    def _encode_full_length(self, context: Tensor, class_tokens: ClassTokens) -> Tensor:
        """Pooled states (G, C, W) of G * C padded sequences."""
        tokens = class_tokens.ids.split(class_tokens.lengths)
        start = [] if self.start_of_text is None else [self.start_of_text]
        length, own = self.context_length, context.shape[-2]
        ids = torch.full((len(tokens), length - own), self.padding)
        for row, name in zip(ids, tokens, strict=True):
            row[: len(start)] = torch.tensor(start, dtype=torch.long)
            row[len(start) : len(start) + len(name)] = name
        embedded = self.embed(ids)  # (C, L - M, W)
        groups, classes = context.shape[0], len(tokens)
        context = context if context.dim() == 4 else context[:, None].expand(-1, classes, -1, -1)
        embedded = embedded.expand(groups, *embedded.shape)
        x = torch.cat([embedded[:, :, : len(start)], context, embedded[:, :, len(start) :]], dim=2).flatten(0, 1)
        x = x + self.positional_embedding.to(x.dtype)
        mask = None if self.attn_mask is None else self.attn_mask.to(x.dtype)
        for block in self.blocks:
            q, k, v = split_heads(block, x).permute(2, 0, 3, 1, 4)  # each (G * C, heads, L, d)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = close_block(block, x, attended.transpose(1, 2).flatten(2))
        x = x.unflatten(0, (groups, classes))
        if self.pool_type in ("argmax", "eos"):
            end = len(start) + own + torch.tensor(class_tokens.lengths, device=x.device) - 1
            return x[:, torch.arange(classes, device=x.device), end]
        return x[:, :, 0 if self.pool_type == "first" else -1]


def _behind_own_context(context: Tensor, names: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Each class's own context (G, C, M, W) in front of its name: (G, C * M + T, W), class after class."""
    pieces = [
        piece
        for index, name in enumerate(names.split(lengths))
        for piece in (context[:, index], name.expand(len(context), -1, -1))
    ]
    return torch.cat(pieces, dim=1)


def _prefix_attention(
    block: ResidualAttentionBlock, x: Tensor, shared: int, packing: Packing, visible: Tensor
) -> Tensor:
    """Causal attention in which each packed name sees its context and itself; without the output projection.

    Args:
        block: gives the projections.
        x: (G, S + rows * width, W) normalised tokens, the shared prefix first.
        shared: S.
        packing: the rows.
        visible: (rows, 1, width, S + width) bool.

    Returns:
        (G, S + rows * width, W).
    """
    # Split, not sliced: the backward pass of a slice fills and adds a zero tensor of the full size.
    prefix, names = split_heads(block, x).split([shared, x.shape[1] - shared], dim=1)
    q, k, v = prefix.permute(2, 0, 3, 1, 4)  # each (G, heads, S, d)
    of_prefix = F.scaled_dot_product_attention(q, k, v, is_causal=True)

    # Groups stand beside heads, so that one mask serves all of them.
    by_row = names.unflatten(1, (packing.rows, packing.width))  # (G, rows, width, 3, heads, d)
    row_q, row_k, row_v = by_row.permute(3, 1, 0, 4, 2, 5).flatten(2, 3)  # each (rows, G * heads, width, d)
    row_k = torch.cat([k.flatten(0, 1).expand(packing.rows, -1, -1, -1), row_k], dim=2)
    row_v = torch.cat([v.flatten(0, 1).expand(packing.rows, -1, -1, -1), row_v], dim=2)
    of_names = F.scaled_dot_product_attention(row_q, row_k, row_v, attn_mask=visible)

    of_names = of_names.unflatten(1, k.shape[:2]).permute(1, 0, 3, 2, 4).flatten(1, 2)  # (G, slots, heads, d)
    return torch.cat([of_prefix.transpose(1, 2), of_names], dim=1).flatten(2)

"""The frozen text tower, read as a function of learned contexts."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastprompt.backbone.blocks import check_block, close_block, split_heads
from fastprompt.backbone.class_tokens import ClassTokens
from fastprompt.backbone.memory import EncodingPlan, MemoryBudget, TowerSize, plan_encoding
from fastprompt.backbone.shared_prefix import ConstantCache, encode_shared_prefix
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
        self.constants = ConstantCache()
        self.shares_prefix = self.attn_mask is not None and self.pool_type in ("argmax", "eos")

    @staticmethod
    def _check(tower: nn.Module) -> None:
        blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
        if blocks is None:
            raise InputError(f"text tower {type(tower).__name__} is not an open_clip text transformer")
        for block in blocks:
            check_block(block)
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

    def size(self) -> TowerSize:
        """What decides how much memory a token takes."""
        hidden, element_size = self.blocks[0].mlp.c_fc.out_features, self.token_embedding.weight.element_size()
        return TowerSize(self.width, hidden, len(self.blocks), element_size)

    def plan(self, groups: int, own: int, shared: int, class_tokens: ClassTokens, budget: MemoryBudget) -> EncodingPlan:
        """How so many contexts in front of all classes are cut to fit a budget.

        Args:
            groups: G.
            own: context tokens that every class has of its own.
            shared: context tokens that all classes share.
            class_tokens: the names.
            budget: see ``Backbone``.
        """
        device, with_gradient = self.token_embedding.weight.device, torch.is_grad_enabled()
        if self.shares_prefix:
            shared, lengths = 1 + shared, tuple(own + length for length in class_tokens.lengths)
        else:
            shared, lengths = 0, (self.context_length,) * len(class_tokens)
        return plan_encoding(self.size(), groups, shared, lengths, budget, device, with_gradient)

    def encode(self, context: Tensor, class_tokens: ClassTokens, budget: MemoryBudget) -> Tensor:
        """Text features (G, C, D), not normalised, of contexts (G, M, W) or (G, C, M, W)."""
        self.check_fits(context.shape[-2], class_tokens)
        context = context.to(self.token_embedding.weight.dtype)
        groups, tokens, class_specific = context.shape[0], context.shape[-2], context.dim() == 4
        own, shared = (tokens, 0) if class_specific else (0, tokens)
        plan = self.plan(groups, own, shared, class_tokens, budget)
        if plan.whole:
            return self._encode(context, class_tokens)
        names = _split(class_tokens, plan.classes)
        rows = []
        for part in context.split(plan.groups):
            contexts = part.split(plan.classes, dim=1) if class_specific else [part] * len(names)
            pieces = [
                checkpoint(self._encode, *piece, use_reentrant=False, preserve_rng_state=False)
                for piece in zip(contexts, names, strict=True)
            ]
            rows.append(torch.cat(pieces, dim=1))
        return torch.cat(rows)

    def _encode(self, context: Tensor, class_tokens: ClassTokens) -> Tensor:
        if self.shares_prefix:
            return self._project(encode_shared_prefix(self, context, class_tokens))
        return self._project(self._encode_full_length(context, class_tokens))

    def _project(self, x: Tensor) -> Tensor:
        x = self.final_norm(x)
        if self.projection is None:
            return x
        return self.projection(x) if isinstance(self.projection, nn.Linear) else x @ self.projection

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


@lru_cache(maxsize=16)  # constants of the pieces are found again by their identity
def _split(class_tokens: ClassTokens, sizes: tuple[int, ...]) -> list[ClassTokens]:
    return class_tokens.split(sizes)

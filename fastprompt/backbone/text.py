"""The frozen text tower, read as a function of learned contexts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastprompt.backbone import shared_prefix
from fastprompt.backbone.blocks import check_block, close_block, split_heads
from fastprompt.backbone.class_tokens import ClassTokens
from fastprompt.backbone.memory import EncodingPlan, MemoryBudget, TowerSize, plan_encoding, release_freed_memory
from fastprompt.backbone.replay import Replays
from fastprompt.backbone.shared_prefix import ConstantCache, NameConstants, bring, encode_shared_prefix
from fastprompt.errors import InputError
from fastprompt.sources.features import queue_copy


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
        self.constants, self.replays = ConstantCache(), Replays()
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
        return F.embedding(queue_copy(ids, self.token_embedding.weight.device), self.token_embedding.weight)

    def check_fits(self, context_tokens: int, class_tokens: ClassTokens) -> None:
        """Raise ``InputError`` if a class name does not fit behind the start of text and that many context tokens."""
        class_tokens.check_fits((self.start_of_text is not None) + context_tokens, self.context_length)

    def size(self) -> TowerSize:
        """What decides how much memory a token takes."""
        hidden, element_size = self.blocks[0].mlp.c_fc.out_features, self.token_embedding.weight.element_size()
        return TowerSize(self.width, hidden, len(self.blocks), element_size)

    @torch.compiler.disable  # integers alone: compiled code would be made anew for every list of names
    def plan(self, groups: int, own: int, shared: int, class_tokens: ClassTokens, budget: MemoryBudget) -> EncodingPlan:
        """How so many contexts of all classes are cut to fit a budget.

        Args:
            groups: G.
            own: context tokens that every class brings beside its name.
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

    def encode(
        self,
        context: Tensor,
        class_tokens: ClassTokens,
        budget: MemoryBudget,
        after: Tensor | None = None,
        cuda_graphs: bool = False,
    ) -> Tensor:
        """Text features (G, C, D), not normalised, of contexts (G, M, W) or (G, C, M, W); ``after`` is behind names."""
        after = context[..., :0, :] if after is None else after
        context, after = (tokens.to(self.token_embedding.weight.dtype) for tokens in (context, after))
        self.check_fits(context.shape[-2] + after.shape[-2], class_tokens)
        own, shared = (context.shape[-2], 0) if context.dim() == 4 else (0, context.shape[-2])
        plan = self.plan(len(context), own + after.shape[-2], shared, class_tokens, budget)
        if plan.whole:
            return self._encode(context, after, class_tokens, plan.sparing, cuda_graphs and not plan.sparing)
        names = class_tokens.split(plan.classes)
        rows, encode = [], partial(self._encode, sparing=plan.sparing)
        for part in zip(context.split(plan.groups), after.split(plan.groups), strict=True):
            learned = [x.split(plan.classes, dim=1) if x.dim() == 4 else [x] * len(names) for x in part]
            pieces = [
                checkpoint(encode, *piece, use_reentrant=False, preserve_rng_state=False)
                for piece in zip(*learned, names, strict=True)
            ]
            rows.append(torch.cat(pieces, dim=1))
        return torch.cat(rows)

    def _encode(
        self, context: Tensor, after: Tensor, class_tokens: ClassTokens, sparing: bool, replay: bool = False
    ) -> Tensor:
        if not self.shares_prefix:
            return self._project(self._encode_full_length(context, class_tokens, after, sparing))
        constants = self.constants.get(self, class_tokens, context, after, keep=not sparing)
        behind = partial(self._encode_behind, constants=constants, sparing=sparing)
        if not replay or not self.constants.has_room(constants):
            return behind(context, after)
        return self.replays.encode(behind, (context, after), constants, self._weights(), shared_prefix.prefix_attention)

    def _encode_behind(self, context: Tensor, after: Tensor, constants: NameConstants, sparing: bool) -> Tensor:
        return self._project(encode_shared_prefix(self, context, after, constants, sparing))

    def _weights(self) -> Iterator[Tensor]:
        """What a pass reads of the model."""
        for part in (self.token_embedding, self.positional_embedding, self.blocks, self.final_norm, self.projection):
            yield from part.parameters() if isinstance(part, nn.Module) else [] if part is None else [part]

    def _project(self, x: Tensor) -> Tensor:
        x = self.final_norm(x)
        if self.projection is None:
            return x
        return self.projection(x) if isinstance(self.projection, nn.Linear) else x @ self.projection

    def _encode_full_length(
        self, context: Tensor, class_tokens: ClassTokens, after: Tensor, sparing: bool = False
    ) -> Tensor:
        """Pooled states (G, C, W) of G * C padded sequences."""
        groups, classes = context.shape[0], len(class_tokens)
        special = [] if self.start_of_text is None else [self.start_of_text]
        start = self.embed(torch.tensor(special, dtype=torch.long)).expand(groups, -1, -1)
        padding = self.embed(torch.tensor([self.padding])).expand(groups, self.context_length, -1)
        context = context if context.dim() == 4 else context[:, None].expand(-1, classes, -1, -1)
        learned = context.shape[-2] + after.shape[-2]
        order = class_tokens.order(context.shape[-2], after.shape[-2], context.device)
        names = self.embed(class_tokens.ids).expand(groups, -1, -1)
        names = bring(names, context, after, classes).index_select(1, order)
        names = names.split([learned + length for length in class_tokens.lengths], dim=1)
        rows = [torch.cat([start, name, padding], dim=1)[:, : self.context_length] for name in names]
        x = torch.stack(rows, dim=1).flatten(0, 1)
        x = x + self.positional_embedding.to(x.dtype)
        mask = None if self.attn_mask is None else self.attn_mask.to(x.dtype)
        for block in self.blocks:
            q, k, v = split_heads(block, x).permute(2, 0, 3, 1, 4)  # each (G * C, heads, L, d)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = close_block(block, x, attended.transpose(1, 2).flatten(2))
            if sparing:
                release_freed_memory(x)
        x = x.unflatten(0, (groups, classes))
        if self.pool_type in ("argmax", "eos"):
            end = start.shape[1] + learned - 1 + torch.tensor(class_tokens.lengths, device=x.device)
            return x[:, torch.arange(classes, device=x.device), end]
        return x[:, :, 0 if self.pool_type == "first" else -1]

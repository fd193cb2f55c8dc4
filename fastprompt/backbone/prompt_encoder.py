"""How contexts and class names are handed to the text tower: which pass, in which pieces, with what is kept."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastprompt.backbone.class_tokens import ClassTokens
from fastprompt.backbone.full_length import encode_full_length
from fastprompt.backbone.kept import Kept, versions
from fastprompt.backbone.memory import EncodingPlan, MemoryBudget, plan_encoding, trimmed_memory
from fastprompt.backbone.packing import pack
from fastprompt.backbone.replay import Replays
from fastprompt.backbone.shared_prefix import PackedNames, embed_names, encode_shared_prefix
from fastprompt.backbone.text_model import TextModel

KEPT_BYTES = 64 * 2**20  # what constants of lists of class names may take; larger ones are made in every pass


class PromptEncoder:
    """Encodes ``[start][context][name][suffix][end]`` for G contexts and C classes.

    Four words say what a prompt is made of:

    * prefix: what all classes share, (G, S, W): start of text, and the context unless classes have their own;
    * before: learned tokens in front of each name, where classes have contexts of their own;
    * name: the tokens of ``ClassTokens``, with suffix and end of text;
    * after: learned tokens between name and suffix.

    In a causal tower nothing after the end of text can reach it, and a prefix does not depend on the class. So each
    prefix is encoded once, the names follow behind it without padding, packed into rows, and every name attends to the
    keys and values of its prefix. This is exact: only the order of summation differs from encoding G * C padded
    sequences. A tower that is not causal (SigLIP) is run at its full length.
    """

    def __init__(self, text: TextModel, start_of_text: int | None, padding: int) -> None:
        self.text, self.start_of_text, self.padding = text, start_of_text, padding
        self.kept, self.replays = Kept(KEPT_BYTES), Replays()

    def check_fits(self, context_tokens: int, class_tokens: ClassTokens) -> None:
        """Raise ``InputError`` if a class name does not fit behind the start of text and that many context tokens."""
        class_tokens.check_fits((self.start_of_text is not None) + context_tokens, self.text.context_length)

    def encode(
        self,
        context: Tensor,
        class_tokens: ClassTokens,
        budget: MemoryBudget,
        after: Tensor | None = None,
        cuda_graphs: bool = False,
    ) -> Tensor:
        """Return text features (G, C, D), not normalised; see ``Backbone.encode_prompts``."""
        after = context[..., :0, :] if after is None else after
        context, after = context.to(self.text.dtype), after.to(self.text.dtype)
        self.check_fits(context.shape[-2] + after.shape[-2], class_tokens)
        prefix, before = self.text.embed_one(self.start_of_text, len(context)), context
        if context.dim() == 3:
            prefix, before = torch.cat([prefix, context], dim=1), context[:, :0]
        learned = prefix, before, after
        plan = self.plan(*learned, class_tokens, budget)
        if plan.whole:
            return self._encode(*learned, class_tokens, plan.trims_memory, cuda_graphs)
        names = class_tokens.split(plan.classes)
        rows, encode = [], partial(self._encode, trims_memory=True)
        for group in zip(*(x.split(plan.groups) for x in learned), strict=True):
            parts = [x.split(plan.classes, dim=1) if x.dim() == 4 else [x] * len(names) for x in group]
            pieces = [
                checkpoint(encode, *piece, use_reentrant=False, preserve_rng_state=False)
                for piece in zip(*parts, names, strict=True)
            ]
            rows.append(torch.cat(pieces, dim=1))
        return torch.cat(rows)

    @torch.compiler.disable  # integers alone: compiled code would be made anew for every list of names
    def plan(
        self, prefix: Tensor, before: Tensor, after: Tensor, class_tokens: ClassTokens, budget: MemoryBudget
    ) -> EncodingPlan:
        """Return how a pass is cut to fit a budget: decided once a shape, so that a training is cut alike."""
        shared, learned = prefix.shape[1], before.shape[-2] + after.shape[-2]
        lengths = tuple(learned + length for length in class_tokens.lengths)
        if not self.text.causal:
            shared, lengths = 0, (self.text.context_length,) * len(class_tokens)
        key = (self.text.size, len(prefix), shared, lengths, budget, prefix.device, torch.is_grad_enabled())
        return self.kept.get(key, partial(plan_encoding, *key))

    def _encode(
        self,
        prefix: Tensor,
        before: Tensor,
        after: Tensor,
        class_tokens: ClassTokens,
        trims_memory: bool,
        cuda_graphs: bool = False,
    ) -> Tensor:
        learned = prefix, before, after
        if self.text.causal:
            names = self._names(*learned, class_tokens, keep=not trims_memory)
            encode = partial(encode_shared_prefix, self.text, names)
            if cuda_graphs and not trims_memory and self.kept.has_room(names):
                return self.replays.encode(encode, learned, names)
        else:
            encode = partial(encode_full_length, self.text, class_tokens, self.padding)
        with trimmed_memory(trims_memory and prefix.device.type == "cpu"):
            return encode(*learned)

    @torch.compiler.disable
    def _names(
        self, prefix: Tensor, before: Tensor, after: Tensor, class_tokens: ClassTokens, keep: bool
    ) -> PackedNames:
        shapes = prefix.shape[1], before.shape[-2], after.shape[-2]
        first = self.text.blocks[0]
        read = (
            self.text.token_embedding.weight,
            self.text.positional_embedding,
            *first.ln_1.parameters(),
            first.attn.in_proj_weight,
            first.attn.in_proj_bias,
        )

        def make() -> PackedNames:
            lengths = tuple(shapes[1] + length + shapes[2] for length in class_tokens.lengths)
            packing = self.kept.get((lengths, prefix.device), partial(pack, lengths, prefix.device))
            return embed_names(self.text, class_tokens, packing, *shapes)

        return self.kept.get((class_tokens, *shapes), make, versions(read), keep=keep)

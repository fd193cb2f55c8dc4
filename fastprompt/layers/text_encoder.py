"""The text tower of existing prompt-learning code, with the shared prefix encoded once and without padding."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fastprompt.backbone.kept import Kept
from fastprompt.backbone.packing import pack
from fastprompt.backbone.prompt_encoder import KEPT_BYTES
from fastprompt.backbone.shared_prefix import end_of_text_states
from fastprompt.backbone.text_model import TextModel
from fastprompt.errors import InputError


class SharedPrefixTextEncoder(nn.Module):
    """Takes the place of the ``TextEncoder`` of CoOp's family, and of ``encode_text`` of GalLoP.

    CLIP's text tower is causal: what stands before the class name is the same for all classes, and what stands behind
    the end of text reaches nothing. The shared positions are encoded once, and the rest of every prompt is packed
    behind them without padding. Only the order of summation differs. Modules and parameters are those of the model,
    under the names that CoOp's layer gives them. The blocks must be frozen when gradients are taken. Autocast does not
    reach into the layer: it computes, and answers, in the precision of the blocks.

    Args:
        clip_model: a CLIP of openai/CLIP or open_clip, or GalLoP's model.

    Raises:
        InputError: a text tower that is not causal, or whose blocks are not those of CLIP: deep prompts (MaPLe,
            PromptSRC), for instance, enter between them.
    """

    def __init__(self, clip_model: nn.Module) -> None:
        super().__init__()
        tower = getattr(clip_model, "text", clip_model)
        _check_causal(TextModel.read(clip_model))
        self._kept = Kept(KEPT_BYTES)
        self.transformer = tower.transformer
        self.token_embedding = tower.token_embedding
        self.positional_embedding = tower.positional_embedding
        self.ln_final = tower.ln_final
        self.text_projection = tower.text_projection

    def forward(self, prompts: Tensor, tokenized_prompts: Tensor) -> Tensor:
        """Text features (C, D), not normalised: CoOp's ``TextEncoder.forward``.

        Which positions are shared is read off the prompts: those in front at which all rows are equal, where the rows
        of a learned context are an ``expand`` of one (as in CoOp, CoCoOp and KgCoOp). Other contexts, class-specific
        ones for instance, share the start of text alone, and save the padding.

        Args:
            prompts: (C, L, W) embedded prompts, as a ``PromptLearner`` makes them.
            tokenized_prompts: (C, L) token ids; the end of text is the largest of a row.

        Raises:
            InputError: shapes that do not fit, or rows that share nothing, not even the start of text.
        """
        self._check_prompts(prompts, tokenized_prompts)
        length = prompts.shape[1]
        ends = (tokenized_prompts.argmax(dim=-1) + 1).tolist()
        shared = _shared_positions(prompts, min(ends) - 1)
        if not shared:
            raise InputError("prompts: expected the same start of text in every row, but rows differ at position 0")
        own = [torch.arange(row * length + shared, row * length + end) for row, end in enumerate(ends)]
        index = torch.cat(own).to(prompts.device)
        behind = prompts.flatten(0, 1).index_select(0, index)[None]
        lengths = tuple(end - shared for end in ends)
        return self._encode(TextModel.read(self), prompts[:1, :shared], behind, lengths)[0]

    def encode(self, context: Tensor, tokenized_names: Tensor) -> Tensor:
        """Text features (C, G, D), not normalised: GalLoP's ``encode_text`` for prompts that all classes share.

        Args:
            context: (G, M, W) learned contexts.
            tokenized_names: (C, L) token ids of the class names alone; the end of text is the largest of a row.

        Raises:
            InputError: shapes that do not fit, or a name that does not fit behind the context.
        """
        text = TextModel.read(self)
        limit, width = self.positional_embedding.shape
        if context.dim() != 3 or context.shape[-1] != width or tokenized_names.dim() != 2:
            raise InputError(
                f"expected context (G, M, {width}) and tokenized_names (C, L), got {tuple(context.shape)} and "
                f"{tuple(tokenized_names.shape)}"
            )
        lengths = tuple(tokenized_names.argmax(dim=-1).tolist())  # without the start of text
        if 1 + context.shape[1] + max(lengths) > limit:
            raise InputError(
                f"tokenized_names: name {lengths.index(max(lengths))} has {max(lengths)} tokens, which do not fit "
                f"behind a context of {context.shape[1]} into the {limit} of the text tower"
            )
        names = torch.cat([row[1 : 1 + end] for row, end in zip(tokenized_names, lengths, strict=True)])
        start, names = (text.embed(ids).expand(len(context), -1, -1) for ids in (tokenized_names[0, :1], names))
        return self._encode(text, torch.cat([start, context.to(text.dtype)], dim=1), names, lengths).transpose(0, 1)

    def _encode(self, text: TextModel, prefix: Tensor, behind: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Return text features (G, C, D) of prefixes (G, S, W) and what follows them (G, T, W), C pieces of lengths."""
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self.transformer.parameters()):
            raise InputError("clip_model: expected a frozen text transformer, got weights that require gradients")
        device, shared = prefix.device, prefix.shape[1]
        packing = self._kept.get((lengths, device), partial(pack, lengths, device))
        with torch.autocast(device.type, enabled=False):  # the weights' precision is the layer's
            prefix = prefix.to(text.dtype) + text.positions(slice(shared))
            slots = behind.to(text.dtype).index_select(1, packing.token) + text.positions(shared + packing.position)
            return text.project(end_of_text_states(text.blocks, prefix, slots, packing))

    def _check_prompts(self, prompts: Tensor, tokens: Tensor) -> None:
        expected = self.positional_embedding.shape
        if prompts.dim() != 3 or prompts.shape[1:] != expected or tokens.shape != prompts.shape[:2]:
            raise InputError(
                f"expected prompts (C, {', '.join(map(str, expected))}) and tokenized_prompts (C, {expected[0]}), got "
                f"{tuple(prompts.shape)} and {tuple(tokens.shape)}"
            )
        if prompts.is_leaf and prompts.requires_grad:
            raise InputError("prompts: expected them to be made of a learned context, got a learned tensor itself")


def _check_causal(text: TextModel) -> None:
    """Raise ``InputError`` for a tower that is not causal, or not read at its end of text."""
    length = text.context_length
    causal = torch.full((length, length), -torch.inf).triu(1)
    if text.mask is None or not torch.equal(text.mask.float().cpu(), causal):
        raise InputError("clip_model: expected a causal text tower; in others the context sees the class name")
    if not text.reads_end_of_text:
        raise InputError("clip_model: expected a text tower that is read at its end of text")


@torch.no_grad()
def _shared_positions(prompts: Tensor, limit: int) -> int:
    """Count the positions in front that are one and the same in all rows, at most ``limit``."""
    equal = (prompts[:, :limit] == prompts[:1, :limit]).all(dim=-1).all(dim=0)  # (limit,)
    shared = int(equal.cumprod(dim=0).sum())
    # Contexts of different classes may start equal, but get gradients of their own: equal values alone prove nothing.
    return shared if _expanded_over_classes(prompts) else min(shared, 1)


def _expanded_over_classes(prompts: Tensor) -> bool:
    """Return whether all that is learned in the prompts (C, L, W) came there by ``expand`` from one row to C."""
    pending, seen = [prompts.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "ExpandBackward0" and (1, 1, 1, *node._saved_self_sym_sizes)[-3] == 1:
            continue
        if not node.next_functions:  # a learned tensor
            return False
        pending += [before for before, _ in node.next_functions]
    return True

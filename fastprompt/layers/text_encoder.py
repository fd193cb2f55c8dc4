"""The text tower of existing prompt-learning code, with the shared prefix encoded once and without padding."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from fastprompt.backbone.packing import pack
from fastprompt.backbone.shared_prefix import end_of_text_states
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
        _check_tower(tower)
        self.transformer = tower.transformer
        self.token_embedding = tower.token_embedding
        self.positional_embedding = tower.positional_embedding
        self.ln_final = tower.ln_final
        self.text_projection = tower.text_projection

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the blocks."""
        return self.transformer.resblocks[0].attn.in_proj_weight.dtype

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
        return self._encode(prompts[:1, :shared], behind, lengths)[0]

    def encode(self, context: Tensor, tokenized_names: Tensor) -> Tensor:
        """Text features (C, G, D), not normalised: GalLoP's ``encode_text`` for prompts that all classes share.

        Args:
            context: (G, M, W) learned contexts.
            tokenized_names: (C, L) token ids of the class names alone; the end of text is the largest of a row.

        Raises:
            InputError: shapes that do not fit, or a name that does not fit behind the context.
        """
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
        start, names = (self.token_embedding(ids).to(self.dtype) for ids in (tokenized_names[:1, :1], names))
        groups = len(context)
        prefix = torch.cat([start.expand(groups, -1, -1), context.to(self.dtype)], dim=1)
        return self._encode(prefix, names.expand(groups, -1, -1), lengths).transpose(0, 1)

    def _encode(self, prefix: Tensor, behind: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Text features (G, C, D) of prefixes (G, S, W) and of all that follows them (G, T, W), C pieces of lengths."""
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in self.transformer.parameters()):
            raise InputError("clip_model: expected a frozen text transformer, got weights that require gradients")
        dtype, shared = self.dtype, prefix.shape[1]
        positions = self.positional_embedding.to(dtype)
        packing = pack(lengths, prefix.device)
        blocks = [_open_clip_layout(block) for block in self.transformer.resblocks]
        with torch.autocast(prefix.device.type, enabled=False):  # the weights' precision is the layer's
            prefix = prefix.to(dtype) + positions[:shared]
            slots = behind.to(dtype).index_select(1, packing.token) + positions[shared + packing.position]
            x = self.ln_final(end_of_text_states(blocks, prefix, slots, packing)).to(dtype)
            return self.text_projection(x) if isinstance(self.text_projection, nn.Linear) else x @ self.text_projection

    def _check_prompts(self, prompts: Tensor, tokens: Tensor) -> None:
        expected = self.positional_embedding.shape
        if prompts.dim() != 3 or prompts.shape[1:] != expected or tokens.shape != prompts.shape[:2]:
            raise InputError(
                f"expected prompts (C, {', '.join(map(str, expected))}) and tokenized_prompts (C, {expected[0]}), got "
                f"{tuple(prompts.shape)} and {tuple(tokens.shape)}"
            )
        if prompts.is_leaf and prompts.requires_grad:
            raise InputError("prompts: expected them to be made of a learned context, got a learned tensor itself")


def _check_tower(tower: nn.Module) -> None:
    """Raise ``InputError`` for a tower that does not have the blocks of CLIP, or is not causal."""
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
    if not blocks:
        raise InputError(f"clip_model: expected the text transformer of a CLIP, got {type(tower).__name__} without one")
    # By name: deep prompts come with blocks of the same attributes and another forward pass.
    if foreign := {type(block).__name__ for block in blocks} - {"ResidualAttentionBlock"}:
        raise InputError(
            f"clip_model: expected the plain blocks of a CLIP text tower, got {', '.join(sorted(foreign))}"
        )
    if foreign := {type(block.mlp.gelu).__name__ for block in blocks} - {"QuickGELU", "GELU"}:
        raise InputError(f"clip_model: expected blocks with QuickGELU or GELU, got {', '.join(sorted(foreign))}")
    mask = getattr(blocks[0], "attn_mask", None)  # openai/CLIP
    mask = getattr(tower, "attn_mask", None) if mask is None else mask  # open_clip
    length = tower.positional_embedding.shape[0]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    if mask is None or not torch.equal(mask.float().cpu(), torch.zeros(length, length).masked_fill(future, -torch.inf)):
        raise InputError("clip_model: expected a causal text tower; in others the context sees the class name")
    if getattr(tower, "pool_type", getattr(tower, "text_pool_type", "argmax")) not in ("argmax", "eos"):
        raise InputError("clip_model: expected a text tower that is read at its end of text")


def _open_clip_layout(block: nn.Module) -> SimpleNamespace:
    """A block in the classes of open_clip, whose blocks scale both residuals; those of openai/CLIP do not."""
    parts = {name: getattr(block, name) for name in ("attn", "ln_1", "ln_2")}
    scales = {name: getattr(block, name, nn.Identity()) for name in ("ls_1", "ls_2")}
    gelu = block.mlp.gelu if isinstance(block.mlp.gelu, nn.GELU) else QuickGELU()
    return SimpleNamespace(
        **parts, **scales, mlp=SimpleNamespace(c_fc=block.mlp.c_fc, gelu=gelu, c_proj=block.mlp.c_proj)
    )


@torch.no_grad()
def _shared_positions(prompts: Tensor, limit: int) -> int:
    """How many positions in front are one and the same in all rows, at most ``limit``."""
    equal = (prompts[:, :limit] == prompts[:1, :limit]).all(dim=-1).all(dim=0)  # (limit,)
    shared = int(equal.cumprod(dim=0).sum())
    # Contexts of different classes may start equal, but get gradients of their own: equal values alone prove nothing.
    return shared if _expanded_over_classes(prompts) else min(shared, 1)


def _expanded_over_classes(prompts: Tensor) -> bool:
    """Whether all that is learned in the prompts (C, L, W) came there by ``expand`` from one row to C."""
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

"""The text tower as everyone runs it: every sequence at its full length."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def encode_padded(model: nn.Module, context: Tensor, ids: Tensor, *, normalise: bool = True) -> Tensor:
    """Text features (G, C, D) the usual way: G * C sequences, each padded to the full context length.

    Args:
        model: an open_clip ``CLIP``.
        context: (G, M, W), or (G, C, M, W) where every class has its own.
        ids: (C, L) token ids of the class names alone, with start and end of text, zero-padded.
        normalise: to length 1.
    """
    groups, (classes, length), own = context.shape[0], ids.shape, context.shape[-2]
    context = context if context.dim() == 4 else context[:, None].expand(-1, classes, -1, -1)
    names = model.token_embedding(ids).expand(groups, -1, -1, -1)  # (G, C, L, W)
    x = torch.cat([names[:, :, :1], context, names[:, :, 1 : length - own]], dim=2).flatten(0, 1)
    end = ids.argmax(dim=-1) + own
    return encode_embedded(model, x, end.repeat(groups), normalise=normalise).unflatten(0, (groups, classes))


def encode_embedded(model: nn.Module, x: Tensor, end: Tensor, *, normalise: bool = True) -> Tensor:
    """Text features (S, D) of S sequences of token embeddings (S, L, W) that end at end (S,)."""
    x = model.transformer(x + model.positional_embedding, attn_mask=model.attn_mask)
    text = model.ln_final(x)[torch.arange(len(x), device=x.device), end] @ model.text_projection
    return F.normalize(text, dim=-1) if normalise else text


def first_positions(model: torch.nn.Module, length: int) -> SimpleNamespace:
    """The text tower of an open_clip model that reads ``length`` tokens: exact, because it is causal."""
    return SimpleNamespace(
        token_embedding=model.token_embedding,
        positional_embedding=model.positional_embedding[:length],
        attn_mask=model.attn_mask[:length, :length],
        transformer=model.transformer,
        ln_final=model.ln_final,
        text_projection=model.text_projection,
    )

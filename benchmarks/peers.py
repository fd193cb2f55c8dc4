"""Plain transcriptions of what the field runs today: the peers of the benchmarks and the oracles of the tests."""

from __future__ import annotations

from collections.abc import Sequence
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


def topk_mean_dense(patches: Tensor, prompts: Tensor, k: Sequence[int]) -> Tensor:
    """Local scores (B, N, C) as in GalLoP's code: the dense similarity, one top-k over patches, a mean per prompt.

    Args:
        patches: (B, P, D).
        prompts: (N, C, D).
        k: patches to keep, one number a prompt.
    """
    dense = torch.einsum("bpd,ncd->bpcn", patches, prompts)
    best = dense.topk(min(max(k), patches.shape[1]), dim=1).values  # (B, max k, C, N), sorted
    return torch.stack([best[:, :count, :, prompt].mean(dim=1) for prompt, count in enumerate(k)], dim=1)


def gallop_dense(
    text: Tensor, pooled: Tensor, local: Tensor, k: Sequence[int], scale: float, labels: Tensor, drawn: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits (B, C) and loss of GalLoP from its equations.

    Args:
        text: (m + n, C, D) normalised text features, global prompts first, n = len(k).
        pooled: (B, D) normalised image features.
        local: (B, P, D) normalised patch features behind both projections.
        k: patches of each local prompt.
        scale: temperature.
        labels: (B,).
        drawn: (B, kept) global prompts that count for each image.
    """
    of_global, of_local = text[: -len(k)], text[-len(k) :]
    cosines = torch.einsum("bd,mcd->bcm", pooled, of_global)
    local_cosines = topk_mean_dense(local, of_local, k)  # (B, n, C)
    logits = scale * (cosines.mean(dim=-1) + local_cosines.mean(dim=1)) / 2
    kept = torch.stack([image[:, index].mean(dim=-1) for image, index in zip(cosines, drawn, strict=True)])
    local_loss = torch.stack([F.cross_entropy(scale * local_cosines[:, j], labels) for j in range(len(k))]).mean()
    return logits, F.cross_entropy(scale * kept, labels) + local_loss


MetaNet = tuple[Tensor, Tensor, Tensor, Tensor]  # weight and bias of the first layer, then of the second


def _meta(net: MetaNet, x: Tensor) -> Tensor:
    return F.linear(F.relu(F.linear(x, *net[:2])), *net[2:])


def cocoop_context(context: Tensor, net: MetaNet, pooled: Tensor) -> Tensor:
    """CoCoOp's context (M, W) for one image.

    Args:
        context: (M, W), learned.
        net: the meta-net.
        pooled: (D,) normalised feature of the image.
    """
    return context + _meta(net, pooled)


def copl_context(context: Tensor, net: MetaNet, patches: Tensor) -> Tensor:
    """CoPL's context (M, W) for one image, token by token, as ``fastprompt.learners.CoPL`` reads it.

    Args:
        context: (M, W), learned.
        net: the meta-net.
        patches: (P, D) normalised patch features of the image.
    """
    answers = _meta(net, patches)  # (P, W)
    similar = [token @ answers.T / len(token) ** 0.5 for token in context]  # M of (P,)
    weights = len(context) * torch.stack([scores.max() for scores in similar]).softmax(dim=0)
    found = [scores.softmax(dim=0) @ answers for scores in similar]
    return torch.stack([w * (token + extra) for w, token, extra in zip(weights, context, found, strict=True)])


def conditional_logits(
    model: nn.Module, contexts: Sequence[Tensor], pooled: Tensor, ids: Tensor, scale: float
) -> Tensor:
    """Logits (B, C) as in CoCoOp's code: image by image through the text tower at its full length.

    Args:
        model: an open_clip ``CLIP``.
        contexts: (M, W) of each image.
        pooled: (B, D) normalised image features.
        ids: (C, L) token ids of names with suffix, as ``encode_padded`` takes them.
        scale: temperature.
    """
    logits = []
    for context, image in zip(contexts, pooled, strict=True):
        text = encode_padded(model, context[None], ids)[0]
        logits.append(scale * image @ text.T)
    return torch.stack(logits)

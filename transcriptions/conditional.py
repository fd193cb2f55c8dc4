"""CoCoOp and CoPL by their equations: image by image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transcriptions.text import encode_padded

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

"""GalLoP by its equations: the dense similarity of all patches with all prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


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

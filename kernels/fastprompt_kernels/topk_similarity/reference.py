"""The definition of topk_similarity, and the oracle of its tests."""

from collections.abc import Sequence

import torch
from torch import Tensor


def topk_similarity(patches: Tensor, prompts: Tensor, k: Sequence[Sequence[int]]) -> Tensor:
    """The formula in plain torch, differentiable by autograd any number of times.

    Args:
        patches: (B, P, D).
        prompts: (N, C, D).
        k: for every prompt its scales, each from 1 to P.

    Returns:
        (B, N, C) in float32, or in float64 for float64 inputs.
    """
    # The stable sort puts the lowest patch first among equal ones.
    ranked = scores(patches, prompts).sort(dim=-1, descending=True, stable=True).values
    return means_of_largest(ranked, k)


def means_of_largest(ranked: Tensor, k: Sequence[Sequence[int]]) -> Tensor:
    """The values (B, N, C) from the similarities (B, N, C, at least the largest scale), the largest first."""
    per_prompt = [
        torch.stack([ranked[:, n, :, :scale].mean(-1) for scale in scales]).mean(0) for n, scales in enumerate(k)
    ]
    return torch.stack(per_prompt, dim=1)


def selected_patches(patches: Tensor, prompts: Tensor, k: Sequence[Sequence[int]]) -> Tensor:
    """(B, N, C, P) bool: the patches among the k largest, for the largest scale of every prompt."""
    order = scores(patches, prompts).sort(dim=-1, descending=True, stable=True).indices
    rank = order.argsort(dim=-1)
    largest = torch.tensor([max(scales) for scales in k], device=rank.device)
    return rank < largest[:, None, None]


def scores(patches: Tensor, prompts: Tensor) -> Tensor:
    """(B, N, C, P) similarities, accumulated in at least float32."""
    dtype = torch.promote_types(patches.dtype, torch.float32)
    return torch.einsum("bpd,ncd->bncp", patches.to(dtype), prompts.to(dtype))

"""The definition of patch_statistics, and the oracle of its tests."""

import torch
from torch import Tensor


def patch_statistics(
    patches: Tensor, prompts: Tensor, scale: float, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The formulas in plain torch, differentiable by autograd any number of times.

    Args:
        patches: (B, P, D).
        prompts: (C, D).
        scale: of the logits.
        labels: (B,) integers, or None.

    Returns:
        maximum, logsumexp and entropy, (B, P) in float32 or in float64 for float64 inputs; the rank (B, P) int64, or
        None without labels.
    """
    dtype = torch.promote_types(patches.dtype, torch.float32)
    logits = scale * torch.einsum("bpd,cd->bpc", patches.to(dtype), prompts.to(dtype))
    # The gradient goes to the first of several equal ones; that of amax would be shared among them.
    maximum = logits.max(-1).values
    log_probability = logits.log_softmax(-1)
    finite = torch.where(logits == -torch.inf, 0, log_probability)
    entropy = -(log_probability.exp() * finite).sum(-1)
    rank = None
    if labels is not None:
        classes = torch.arange(len(prompts), device=prompts.device)
        label = labels.long()[:, None, None]
        own = logits.gather(-1, label.expand(*logits.shape[:2], 1))
        rank = ((logits > own) | ((logits == own) & (classes < label))).sum(-1)
    return maximum, logits.logsumexp(-1), entropy, rank

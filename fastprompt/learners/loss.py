"""Cross-entropies that learners share: over all classes, or over the shard of them that one process holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class ClassShard:
    """The classes from ``start`` to below ``stop``, which this process holds of all that its group shares out.

    Attributes:
        start: first class.
        stop: class behind the last one.
        group: of processes; None for all of them.
    """

    start: int
    stop: int
    group: dist.ProcessGroup | None = None


def class_cross_entropy(logits: Tensor, labels: Tensor, *, shard: ClassShard | None = None) -> Tensor:
    """Cross-entropy of logits with labels, averaged over rows, a scalar.

    Args:
        logits: (B, C); of a shard its columns (B, stop - start). Every process gets the loss of all classes, and the
            gradient of its own logits.
        labels: (B,) among all classes, on any device.
        shard: which classes the logits are of; None for all.
    """
    labels = labels.to(logits.device)
    return F.cross_entropy(logits, labels) if shard is None else _Sharded.apply(logits, labels, shard)


def drawn_prompts(
    images: int, prompts: int, dropout: float, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Draw the prompts that count for each image, (images, kept), with replacement, as GalLoP's code does.

    Args:
        images: B.
        prompts: how many there are.
        dropout: share of them that is left out; at least one is kept.
        device: where they are drawn.
        generator: of that device; None for torch's own.
    """
    kept = max(prompts - int(dropout * prompts), 1)
    return torch.randint(prompts, (images, kept), device=device, generator=generator)


def drawn_cross_entropy(cosines: Tensor, labels: Tensor, scale: Tensor | float, drawn: Tensor) -> Tensor:
    """Cross-entropy of scaled cosines (B, m, C), averaged over the ``drawn`` prompts (B, kept) of every image."""
    kept = cosines.take_along_dim(drawn[:, :, None], dim=1).mean(dim=1)  # (B, C)
    return class_cross_entropy(scale * kept, labels)


def prompt_cross_entropy(cosines: Tensor, labels: Tensor, scale: Tensor | float) -> Tensor:
    """Cross-entropy of scaled cosines (B, n, C), every prompt for itself, averaged over images and prompts."""
    every_prompt = labels[:, None].expand(cosines.shape[:2])
    return class_cross_entropy(scale * cosines.flatten(0, 1), every_prompt.flatten())


class _Sharded(torch.autograd.Function):
    """See ``class_cross_entropy``: the largest logit, then two sums a row, go around; never the logits."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, shard: ClassShard) -> Tensor:  # noqa: ANN001
        largest = logits.amax(dim=1)
        dist.all_reduce(largest, dist.ReduceOp.MAX, shard.group)
        shifted = logits - largest[:, None]
        here = (labels >= shard.start) & (labels < shard.stop)
        place = (labels - shard.start).clamp(0, logits.shape[1] - 1)[:, None]
        sums = torch.stack([shifted.exp().sum(dim=1), shifted.gather(1, place)[:, 0] * here])
        dist.all_reduce(sums, dist.ReduceOp.SUM, shard.group)
        ctx.save_for_backward(shifted, sums[0], place, here)
        return (sums[0].log() - sums[1]).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN001
        shifted, total, place, here = ctx.saved_tensors
        grad_logits = shifted.exp() / total[:, None]
        grad_logits.scatter_add_(1, place, -here[:, None].to(grad_logits))
        return grad * grad_logits / len(grad_logits), None, None

"""Scores by optimal transport: how much of each patch goes to each prompt of a class, and how similar they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from fastprompt_kernels import iterations_until, sinkhorn, sinkhorn_changes
from torch import Tensor

from fastprompt.errors import InputError

# Similarities that are held at once. The transport holds about four times as much beside them.
CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Transport:
    """Entropic transport between the patches of an image and the prompts of a class, as PLOT has it.

    Attributes:
        eps: strength of the entropy term, in units of cosines.
        iterations: at most.
        tolerance: of the stopping rule, which looks at the whole batch; 0 makes all iterations.
        keep: how many patches of an image take part: for each class those with the largest cosine, averaged over its
            prompts. None, or a number larger than P, means all.
    """

    eps: float = 0.1
    iterations: int = 100
    tolerance: float = 1e-2
    keep: int | None = None

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise InputError(f"eps: expected a number above 0, got {self.eps}")
        if self.iterations < 1:
            raise InputError(f"iterations: expected at least 1, got {self.iterations}")
        if not self.tolerance >= 0:
            raise InputError(f"tolerance: expected a number of at least 0, got {self.tolerance}")
        if self.keep is not None and self.keep < 1:
            raise InputError(f"patches: expected at least 1 to keep, got {self.keep}")


def transport_similarity(patches: Tensor, prompts: Tensor, transport: Transport) -> Tensor:
    """The cosines of patches and prompts, averaged with the weights of the transport plan.

        scores[b, c] = sum over p and n of plan[b, c, p, n] <patches[b, p], prompts[n, c]>,  cost = 1 - cosine

    The plan counts as constant, so the gradient needs nothing but the plan: images are taken a few at a time, forward
    and backward, and the (B, P, N, C) cosines are never held as a whole.

    Args:
        patches: (B, P, D), L2-normalised.
        prompts: (N, C, D), L2-normalised.
        transport: its constants.

    Returns:
        (B, C).
    """
    return _TransportSimilarity.apply(patches, prompts, transport)


class _TransportSimilarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx, patches: Tensor, prompts: Tensor, transport: Transport) -> Tensor:  # noqa: ANN001
        made = _iterations(patches, prompts, transport)
        scores = patches.new_empty(len(patches), prompts.shape[1])
        for images in _chunks(patches, prompts):
            cosines = _cosines(patches[images], prompts)
            scores[images] = (_plan(cosines, transport, made) * cosines).sum((1, 2))
        ctx.save_for_backward(patches, prompts)
        ctx.transport, ctx.made = transport, made
        return scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # noqa: ANN001
        patches, prompts = ctx.saved_tensors
        of_patches, of_prompts = map(torch.zeros_like, (patches, prompts))
        matrix = prompts.flatten(0, 1)  # (N * C, D)
        for images in _chunks(patches, prompts):
            plan = _plan(_cosines(patches[images], prompts), ctx.transport, ctx.made)
            weights = (plan * grad[images, None, None]).flatten(2)  # (images, P, N * C)
            if ctx.needs_input_grad[0]:
                of_patches[images] = weights @ matrix
            if ctx.needs_input_grad[1]:
                of_prompts += (weights.flatten(0, 1).mT @ patches[images].flatten(0, 1)).view(prompts.shape)
        return of_patches, of_prompts, None


def _chunks(patches: Tensor, prompts: Tensor) -> list[slice]:
    """The images, as many at a time as CHUNK_BYTES hold."""
    cells = patches.shape[1] * prompts.shape[0] * prompts.shape[1] * patches.itemsize
    size = max(1, CHUNK_BYTES // cells)
    return [slice(start, start + size) for start in range(0, len(patches), size)]


def _cosines(patches: Tensor, prompts: Tensor) -> Tensor:
    """(images, P, N, C)."""
    return (patches @ prompts.flatten(0, 1).mT).unflatten(2, prompts.shape[:2])


def _iterations(patches: Tensor, prompts: Tensor, transport: Transport) -> int:
    """How many iterations the stopping rule makes for the whole batch."""
    if not (transport.tolerance and len(patches)):
        return transport.iterations

    def changes(count: int) -> Tensor:
        """The mean over the batch, whose parts may differ in size by the last."""
        total = patches.new_zeros(count)
        for images in _chunks(patches, prompts):
            cost = _cost(_cosines(patches[images], prompts), transport)[0]
            total += sinkhorn_changes(cost, eps=transport.eps, iterations=count) * len(cost)
        return total / len(patches)

    return iterations_until(transport.tolerance, transport.iterations, changes)


def _cost(cosines: Tensor, transport: Transport) -> tuple[Tensor, Tensor | None]:
    """The costs (images, C, P, N) of patches (images, P, N, C), of those kept only, and which these are."""
    index = None
    if transport.keep is not None and transport.keep < cosines.shape[1]:
        index = cosines.mean(2).topk(transport.keep, dim=1).indices[:, :, None].expand(-1, -1, cosines.shape[2], -1)
        cosines = cosines.gather(1, index)
    return (1 - cosines).permute(0, 3, 1, 2), index


def _plan(cosines: Tensor, transport: Transport, iterations: int) -> Tensor:
    """The plans, laid out like the cosines (images, P, N, C); 0 for patches that are not kept."""
    cost, index = _cost(cosines, transport)
    plan = sinkhorn(cost, eps=transport.eps, iterations=iterations).permute(0, 2, 3, 1)
    return plan if index is None else torch.zeros_like(cosines).scatter(1, index, plan)

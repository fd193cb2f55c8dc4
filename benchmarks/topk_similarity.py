"""GalLoP's local similarity: the mean of the k largest patch similarities of every prompt, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from fastprompt_kernels import topk_similarity
from torch import Tensor

from benchmarks.measure import Benchmark, Case, Shape
from benchmarks.peers import topk_mean_dense

K = (5, 10, 15, 20)


def topk_mean_one_product(patches: Tensor, prompts: Tensor, k: Sequence[int]) -> Tensor:
    """The best eager rewrite found: one matrix product, patches last so that top-k reads contiguous rows, unsorted.

    Arguments and result as ``peers.topk_mean_dense``.
    """
    dense = prompts.flatten(0, 1) @ patches.flatten(0, 1).T
    by_prompt = dense.view(*prompts.shape[:2], *patches.shape[:2])  # (N, C, B, P)
    means = [rows.topk(count, sorted=False).values.mean(-1) for rows, count in zip(by_prompt.unbind(), k, strict=True)]
    return torch.stack(means).permute(2, 0, 1)


def build(shape: Shape, device: torch.device) -> Case:
    """``impl="auto"`` beside eager code, on random unit vectors."""
    generator = torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, generator=generator, device=device)
    patches = F.normalize(random(shape["B"], shape["P"], shape["D"]), dim=-1)
    prompts = F.normalize(random(shape["N"], shape["C"], shape["D"]), dim=-1)
    k = K[: shape["N"]]
    weights = random(shape["B"], shape["N"], shape["C"]) * _decided(patches, prompts, k)

    def forward_backward(similarity: Callable[[Tensor, Tensor, Sequence[int]], Tensor]) -> tuple[Tensor, ...]:
        leaves = patches.detach().requires_grad_(), prompts.detach().requires_grad_()
        values = similarity(*leaves, k)
        values.backward(weights)
        return values.detach(), leaves[0].grad, leaves[1].grad

    return Case(
        {
            "GalLoP eager": partial(forward_backward, topk_mean_dense),
            "best eager": partial(forward_backward, topk_mean_one_product),
            "fastprompt": partial(forward_backward, topk_similarity),
        },
        baseline="GalLoP eager",
        tolerance=1e-4,  # float32; one wrong patch in the largest of these cases moves a gradient by more
    )


def _decided(patches: Tensor, prompts: Tensor, k: Sequence[int]) -> Tensor:
    """(B, N, C) bool: the k-th and the next similarity differ by more than the rounding of float32.

    Where they do not, which patch is selected is a matter of rounding. No gradient flows there, so that the
    implementations can be compared.
    """
    decided = []
    for prompt, count in zip(prompts, k, strict=True):
        top = (prompt @ patches.mT).topk(count + 1).values
        decided.append(top[..., count - 1] - top[..., count] > 1e-6)
    return torch.stack(decided, dim=1)


def _shapes(B: int, classes: Sequence[int]) -> tuple[Shape, ...]:
    return tuple({"B": B, "P": 196, "N": len(K), "D": 512, "C": C} for C in classes)


BENCHMARK = Benchmark(
    name="topk_similarity",
    title=f"Mean of the k = {K} largest patch similarities, forward and backward to patches and prompts",
    dtype="float32",
    build=build,
    shapes=_shapes(32, (47, 397, 1000)) + _shapes(8, (47, 397, 1000)),
    quick_shapes=_shapes(32, (47, 397)),
    panels=("B", "P", "N", "D"),
)

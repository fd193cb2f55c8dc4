"""What the benchmarks of the similarity kernels share: features, runs with and without gradients, floors, shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Implementation, Shape

FORWARD, TRAINING = "forward", "forward+backward"
PASSES = (FORWARD, TRAINING)

# Of features that are no longer than 1, by what two similarities may differ through rounding alone. A bfloat16 between
# 1/8 and 1/4, where the largest similarities of random vectors lie, is known to 2^-10.
ROUNDING = {"float32": 1e-6, "bfloat16": 2**-10}
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}

Function = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def draw(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Callable[..., Tensor]]:
    """Random unit vectors: patches (B, P, D) and prompts (N, C, D), and where more random numbers come from."""
    generator = torch.Generator(device).manual_seed(0)
    random = partial(torch.randn, generator=generator, device=device)
    dtype = getattr(torch, shape["dtype"])
    patches = F.normalize(random(shape["B"], shape["P"], shape["D"]), dim=-1).to(dtype)
    return patches, F.normalize(random(shape["N"], shape["C"], shape["D"]), dim=-1).to(dtype), random


def run(function: Function, patches: Tensor, prompts: Tensor, grads: Sequence[Tensor] | None) -> Implementation:
    """The function for inference or, where gradients of its results are given, forward and backward to both inputs."""

    def forward() -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return function(patches, prompts)

    def forward_backward() -> tuple[Tensor, ...]:
        leaves = patches.detach().requires_grad_(), prompts.detach().requires_grad_()
        results = function(*leaves)
        torch.autograd.backward(results, [grad.to(result.dtype) for grad, result in zip(grads, results, strict=True)])
        return *(result.detach() for result in results), leaves[0].grad, leaves[1].grad

    return forward if grads is None else forward_backward


def truth(
    function: Function, patches: Tensor, prompts: Tensor, grads: Sequence[Tensor] | None, images: int = 8
) -> Implementation:
    """What `run` must give, in float64 and by a definition; some images at a time, so that there is memory for it."""

    def exact() -> tuple[Tensor, ...]:
        chunks = zip(patches.double().split(images), *(grad.split(images) for grad in grads or ()), strict=True)
        parts = [run(function, chunk, prompts.double(), of_chunk or None)() for chunk, *of_chunk in chunks]
        *of_images, last = zip(*parts, strict=True)
        # The gradient of the prompts, which comes last, is a sum over all images.
        return *map(torch.cat, of_images), torch.cat(last) if grads is None else sum(last)

    return exact


def floors(shape: Shape, patches: Tensor, prompts: Tensor, values: int) -> Mapping[str, Callable[[], object]]:
    """The least work of a method that makes the dense similarity, and of any method that reads and writes its tensors.

    Args:
        shape: whose pass is forward, with one product, or forward and backward, with three of them.
        patches: (B, P, D).
        prompts: (..., D).
        values: how many numbers the computation returns, gradients not counted.
    """
    left, right = prompts.reshape(-1, prompts.shape[-1]), patches.flatten(0, 1)
    training = shape["pass"] == TRAINING
    product = torch.empty(len(left), len(right), dtype=left.dtype, device=left.device)
    grad_left, grad_right = torch.empty_like(left), torch.empty_like(right)
    moved = (1 + training) * (left.nbytes + right.nbytes) + values * left.element_size()
    source = torch.ones(moved // 2, dtype=torch.uint8, device=left.device)
    target = torch.empty_like(source)

    def products() -> None:
        torch.mm(left, right.T, out=product)
        if training:
            torch.mm(product, right, out=grad_left)
            torch.mm(product.T, left, out=grad_right)

    return {"floor: products": products, "floor: copy": lambda: target.copy_(source)}


def around(middle: Shape, sweeps: Mapping[str, Sequence[int]]) -> tuple[Shape, ...]:
    """For each pass the middle shape, and those that differ from it in one parameter."""
    shapes = []
    for direction in PASSES:
        centre = {**middle, "pass": direction}
        shapes += [centre, *({**centre, axis: value} for axis, values in sweeps.items() for value in values)]
    return tuple(shapes)

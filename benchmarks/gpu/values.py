"""Every variant of every Triton kernel against float64, by norms; which element is wrong, the test suite says.

In float32 the error of a result must be at most 1e-4 of its norm. In 16 bits it may be twice that of the reference in
the same precision, or one rounding of it. Equal similarities and NaN are compared exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import torch
from fastprompt_kernels import patch_statistics, prefix_attention, resized_crop, sinkhorn, topk_similarity
from fastprompt_kernels.testing import draw_inputs, draw_statistics_inputs, poisoned_memory
from torch import Tensor

from benchmarks.gpu.cases import Rows
from benchmarks.gpu.plan import Plan

FLOAT32_ERROR = 1e-4
TIMES_THE_REFERENCE = 2.0

Compute = Callable[[str, torch.dtype | None], Sequence[Tensor]]  # by implementation, in another dtype if one is given


def items(plan: Plan) -> dict[str, Rows]:
    """An item for each variant, those of 16 bits first."""
    dtypes = ("bfloat16",) if plan.quick else ("bfloat16", "float16", "float32")
    classes, width, sizes = (5, 16, (9,)) if plan.rehearse else (130, 512, (196, 49, 577))
    runs = (4,) if plan.quick else (4, 16) if plan.rehearse else (16, 8, 32, 4, 64)
    found: dict[str, Rows] = {}
    for dtype, P, K, scales in product(dtypes, sizes, runs, (1, 2)):
        k = (K - K // 4,) if scales == 1 else (K - K // 4, K // 2)
        shape = (3, P, 2, classes, width)
        found[f"topk_similarity {dtype} P={P} k={k}"] = partial(_similarity, plan, shape, k, dtype)
    for dtype in dtypes:
        found[f"topk_similarity {dtype} ties"] = partial(_ties, plan, dtype)
        found[f"topk_similarity {dtype} NaN"] = partial(_nan, plan, dtype)
        found[f"patch_statistics {dtype}"] = partial(_statistics, plan, (2, 9, classes, width), dtype)
        if dtype != "float32":  # which the kernels of the attention do not take
            for asking in (0, 3):
                found[f"prefix_attention {dtype} asking={asking}"] = partial(_attention, plan, asking, dtype)
    for tolerance in (None, 1e-2):
        found[f"sinkhorn tolerance={tolerance}"] = partial(_sinkhorn, plan, tolerance)
    for levels in (True, False):
        found[f"resized_crop levels={levels}"] = partial(_crop, plan, levels)
    return found


def _compare(names: Sequence[str], compute: Compute) -> Iterator[dict]:
    """A row for each result of the Triton kernels."""
    truth, plain = compute("reference", torch.float64), compute("reference", None)
    with poisoned_memory():
        actual = compute("triton", None)
    for name, own, other, exact in zip(names, actual, plain, truth, strict=True):
        error, allowed = _error(own, exact), FLOAT32_ERROR
        if own.dtype != torch.float32 or other.dtype != torch.float32:
            allowed = max(TIMES_THE_REFERENCE * _error(other, exact), torch.finfo(own.dtype).eps)
        yield {"result": name, "error": error, "allowed": allowed, "right": error <= allowed}


def _error(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


def _similarity(plan: Plan, shape: tuple[int, ...], k: Sequence[int], dtype: str) -> Iterator[dict]:
    inputs = draw_inputs(shape, [k] * shape[2], getattr(torch, dtype), device=plan.device)

    def compute(impl: str, other: torch.dtype | None) -> tuple[Tensor, ...]:
        leaves = [x.to(other or x.dtype).detach().requires_grad_() for x in (inputs.patches, inputs.prompts)]
        with torch.no_grad():  # another variant of the kernel
            inference = topk_similarity(*leaves, inputs.k, impl=impl)
        values = topk_similarity(*leaves, inputs.k, impl=impl)
        return inference, values.detach(), *torch.autograd.grad(values, leaves, inputs.grad.to(values.dtype))

    yield from _compare(("inference", "values", "patches.grad", "prompts.grad"), compute)


def _ties(plan: Plan, dtype: str) -> Iterator[dict]:
    """Halves, weighted by powers of two: all sums are exact, so the results must be those of float64, rounded."""
    inputs = draw_inputs((2, 70, 2, 5, 8), [[4], [16]], getattr(torch, dtype), ties=True, device=plan.device)
    found = []
    for impl, other in (("triton", inputs.patches.dtype), ("reference", torch.float64)):
        leaves = [x.to(other).detach().requires_grad_() for x in (inputs.patches, inputs.prompts)]
        values = topk_similarity(*leaves, inputs.k, impl=impl)
        found.append([values.detach(), *torch.autograd.grad(values.sum(), leaves)])
    for name, own, exact in zip(("values", "patches.grad", "prompts.grad"), *found, strict=True):
        yield {"result": name, "right": torch.equal(own, exact.to(own.dtype))}


def _nan(plan: Plan, dtype: str) -> Iterator[dict]:
    """A patch that is not a number spoils every score of its image, and no other."""
    inputs = draw_inputs((2, 70, 2, 5, 8), [[3], [20]], getattr(torch, dtype), device=plan.device)
    spoilt = inputs.patches.clone()
    spoilt[0, 66, 3] = torch.nan
    for gradient in (False, True):
        clean, values = (
            topk_similarity(x.requires_grad_(gradient), inputs.prompts, inputs.k, impl="triton").detach()
            for x in (inputs.patches, spoilt)
        )
        right = bool(values[0].isnan().all()) and torch.equal(values[1], clean[1])
        yield {"result": "values" if gradient else "inference", "right": right}


def _statistics(plan: Plan, shape: tuple[int, ...], dtype: str) -> Iterator[dict]:
    inputs = draw_statistics_inputs(shape, getattr(torch, dtype), scale=0.1, device=plan.device)

    def compute(impl: str, other: torch.dtype | None) -> tuple[Tensor, ...]:
        leaves = [x.to(other or x.dtype).detach().requires_grad_() for x in (inputs.patches, inputs.prompts)]
        found = patch_statistics(*leaves, scale=inputs.scale, labels=inputs.labels, impl=impl)
        grads = [grad.to(found.maximum.dtype) for grad in inputs.grads]
        rank = (1 + found.rank).double() if other else (1 + found.rank).float()
        return *(x.detach() for x in found[:3]), rank, *torch.autograd.grad(found[:3], leaves, grads)

    yield from _compare(("maximum", "logsumexp", "entropy", "1 + rank", "patches.grad", "prompts.grad"), compute)


def _attention(plan: Plan, asking: int, dtype: str) -> Iterator[dict]:
    S, rows, width, H, d = (3, 2, 8, 2, 16) if plan.rehearse else (5, 20, 56, 8, 64)
    generator = torch.Generator().manual_seed(0)
    sequence = (torch.arange(rows * width).view(rows, width) // 3).to(plan.device)
    slots = torch.randint(width, (rows, asking), generator=generator).to(plan.device) if asking else None
    sizes = [(2, S + rows * width, 2 if asking else 3, H, d), *([(2, rows * asking, H, d)] if asking else [])]
    inputs = [torch.randn(size, generator=generator).to(plan.device, getattr(torch, dtype)) for size in sizes]

    def compute(impl: str, other: torch.dtype | None) -> tuple[Tensor, ...]:
        leaves = [x.to(other or x.dtype).detach().requires_grad_() for x in inputs]
        result = prefix_attention(leaves[0], sequence, queries=leaves[1] if asking else None, slots=slots, impl=impl)
        grad = torch.linspace(-1, 1, result.numel(), device=result.device).to(result.dtype).view_as(result)
        return result.detach(), *torch.autograd.grad(result, leaves, grad)

    yield from _compare(("result", "tokens.grad", "queries.grad")[: 1 + len(inputs)], compute)


def _sinkhorn(plan: Plan, tolerance: float | None) -> Iterator[dict]:
    shape = (2, 9, 4) if plan.rehearse else (500, 196, 4)
    cost = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(plan.device)

    def compute(impl: str, other: torch.dtype | None) -> tuple[Tensor, ...]:
        return (sinkhorn(cost.to(other or cost.dtype), iterations=20, tolerance=tolerance, impl=impl),)

    yield from _compare(("plan",), compute)


def _crop(plan: Plan, levels: bool) -> Iterator[dict]:
    """Two images of different sizes, one of them mirrored."""
    height, width, size = (9, 12, 5) if plan.rehearse else (300, 400, 224)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (6 * height * width,), dtype=torch.uint8, generator=generator).to(plan.device)
    places = torch.tensor([[0, height, width], [3 * height * width, width, height]])
    boxes, flips = torch.tensor([[1, 2, height - 3, width - 4], [0, 0, width, height]]), torch.tensor([False, True])

    def compute(impl: str, other: torch.dtype | None) -> tuple[Tensor, ...]:
        source = pixels if levels else pixels.to(other or torch.float32)
        return (resized_crop(source, places, boxes, size, flips=flips, impl=impl),)

    if levels:  # sums of the weights round otherwise, so that a level can be the next one
        apart = (255 * (compute("triton", None)[0] - compute("reference", None)[0])).abs()
        share = (apart > 0.5).double().mean().item()
        yield {"result": "levels", "apart": apart.max().item(), "share": share, "right": bool(apart.max() < 1.5)}
    else:
        yield from _compare(("pixels",), compute)

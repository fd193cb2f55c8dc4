"""Operators inside of a CUDA graph and of ``torch.compile(fullgraph=True)``: the same bits as outside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from fastprompt_kernels import patch_statistics, prefix_attention, sinkhorn, topk_similarity
from torch import Tensor

from benchmarks.gpu.cases import Rows
from benchmarks.gpu.clock import capture
from benchmarks.gpu.plan import Plan

Function = Callable[..., Tensor]


def items(plan: Plan) -> dict[str, Rows]:
    """Two items for each operator."""
    found: dict[str, Rows] = {}
    for name, (function, inputs) in operators(plan.device).items():
        found[f"graph {name}"] = partial(_graph, function, inputs)
        if not plan.quick:
            found[f"compile {name}"] = partial(_compile, plan, function, inputs)
    return found


def operators(device: str) -> dict[str, tuple[Function, list[Tensor]]]:
    """By name a differentiable function, and its inputs."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, torch.bfloat16)

    sequence = (torch.arange(32).view(2, 16) // 3).to(device)
    return {
        "topk_similarity": (partial(topk_similarity, k=[[3], [5]], impl="triton"), [draw(2, 70, 32), draw(2, 7, 32)]),
        "patch_statistics": (
            lambda patches, prompts: torch.stack(patch_statistics(patches, prompts, scale=0.1, impl="triton")[:3]),
            [draw(2, 9, 32), draw(7, 32)],
        ),
        "prefix_attention": (
            lambda tokens: prefix_attention(tokens, sequence, impl="triton"), [draw(2, 36, 3, 2, 16)],
        ),
        "sinkhorn": (
            lambda cost: sinkhorn(cost.float().sigmoid(), iterations=5, tolerance=1e-2, impl="triton"), [draw(3, 9, 4)],
        ),
    }  # fmt: skip


def _both(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The result, and the gradients of what it depends on."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = function(*leaves)
    if not result.requires_grad:
        return [result]
    return [result.detach(), *torch.autograd.grad(result, leaves, torch.ones_like(result))]


def _graph(function: Function, inputs: Sequence[Tensor]) -> Iterator[dict]:
    """Replays are given other inputs at the same place than those that were captured."""
    replay, captured = capture(lambda: _both(function, inputs), inputs[0].device)
    for x in inputs:
        x.copy_(x.flip(0))
    expected = _both(function, inputs)
    for times in (1, 2):
        replay()
        yield {"replays": times, "right": all(map(torch.equal, captured, expected))}


def _compile(plan: Plan, function: Function, inputs: Sequence[Tensor]) -> Iterator[dict]:
    """Inductor on a GPU. In a rehearsal the part before it, which needs no C++ compiler."""
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager" if plan.rehearse else "inductor")
    pairs = list(zip(_both(compiled, inputs), _both(function, inputs), strict=True))
    error = max(((own - other).double().norm() / other.double().norm()).item() for own, other in pairs)
    same = all(torch.equal(*pair) for pair in pairs)
    yield {"same_bits": same, "error": error, "right": error <= torch.finfo(torch.bfloat16).eps}

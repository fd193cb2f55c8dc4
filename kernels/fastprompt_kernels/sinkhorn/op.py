"""Registration of sinkhorn with torch. There is no gradient, so the operators hold every implementation."""

from types import ModuleType

import torch
from torch import Tensor

from ..implementations import on_its_device, runs_triton, without_autocast
from . import blocked, reference

# As many elements of a problem, each axis rounded up to a power of two, are 32 in each thread. With 64 it spills.
MOST_ELEMENTS = 4096


def sinkhorn(cost: Tensor, eps: float, iterations: int, tolerance: float | None, impl: str) -> Tensor:
    """Validated arguments in, plans out."""
    with without_autocast(cost.device):
        return _plan(cost.detach(), eps, iterations, tolerance, impl)


def sinkhorn_changes(cost: Tensor, eps: float, iterations: int, impl: str) -> Tensor:
    """Validated arguments in, changes out."""
    with without_autocast(cost.device):
        return _changes(cost.detach(), eps, iterations, impl)


@torch.library.custom_op("fastprompt::sinkhorn", mutates_args=())
@on_its_device
def _plan(cost: Tensor, eps: float, iterations: int, tolerance: float | None, impl: str) -> Tensor:
    if impl == "reference":
        return reference.sinkhorn(cost, eps, iterations, tolerance)[0]
    problems = cost.reshape(-1, *cost.shape[-2:])
    return _implementation(impl, cost).plan(problems, eps, iterations, tolerance).view(cost.shape)


@_plan.register_fake
def _(cost: Tensor, eps: float, iterations: int, tolerance: float | None, impl: str) -> Tensor:
    return cost.new_empty(cost.shape, dtype=torch.promote_types(cost.dtype, torch.float32))


@torch.library.custom_op("fastprompt::sinkhorn_changes", mutates_args=())
@on_its_device
def _changes(cost: Tensor, eps: float, iterations: int, impl: str) -> Tensor:
    if impl == "reference":
        return reference.sinkhorn(cost, eps, iterations, None)[1]
    return _implementation(impl, cost).changes(cost.reshape(-1, *cost.shape[-2:]), eps, iterations)


@_changes.register_fake
def _(cost: Tensor, eps: float, iterations: int, impl: str) -> Tensor:
    return cost.new_empty(iterations, dtype=torch.promote_types(cost.dtype, torch.float32))


def _implementation(impl: str, cost: Tensor) -> ModuleType:
    M, N = (1 << (length - 1).bit_length() for length in cost.shape[-2:])
    too_much = None
    if M * N > MOST_ELEMENTS:
        too_much = f"the kernel keeps a problem in registers, which hold at most {MOST_ELEMENTS} elements, not {M * N}"
    if not runs_triton(impl, cost.device, cost.dtype, too_much):
        return blocked
    from . import triton

    return triton

"""A Triton kernel of sinkhorn: problems stay in registers from the first iteration to the last.

With a stopping rule the host does not wait: a first launch makes all iterations and notes the changes, the device finds
the iteration that stops, and a second launch makes as many and writes the plans.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_launch import index_dtype
from .reference import LOWEST

# Elements of a tile of several problems: 16 in each thread of 4 warps, beside as many products and the scalings.
TILE = 2048


@triton.jit(do_not_specialize=["X"])
def sinkhorn_kernel(
    cost, plan, changes, count, eps, X, M, N, stride_x, stride_m, stride_n,
    CHANGES: tl.constexpr, LOWEST: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The plans (X, M, N) of BLOCK_X problems after `count` iterations, or (CHANGES) the sums of changes in each."""
    program = tl.program_id(0)
    x = program.to(INDEX) * BLOCK_X + tl.arange(0, BLOCK_X).to(INDEX)
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    of_row = (x < X)[:, None] & (m < M)[None, :]
    of_column = (x < X)[:, None] & (n < N)[None, :]
    inside = of_row[:, :, None] & (n < N)[None, None, :]
    address = cost + x[:, None, None] * stride_x + m[None, :, None] * stride_m + n[None, None, :] * stride_n
    value = tl.load(address, mask=inside, other=float("inf")).to(tl.float32)
    low = tl.where(of_row, tl.min(value, 2), 0.0)
    exponent = tl.maximum((low[:, :, None] - value) / eps, LOWEST, propagate_nan=tl.PropagateNan.ALL)
    kernel = tl.where(inside, tl.exp(exponent), 0.0)

    unit = tl.exp(low / eps)
    before = tl.full((BLOCK_X, BLOCK_M), 1.0, tl.float32)
    rows = before
    columns = tl.full((BLOCK_X, BLOCK_N), 1.0, tl.float32)
    steps = tl.load(count)
    for step in range(steps):
        rows = tl.where(of_row, 1 / (M * tl.sum(kernel * columns[:, None, :], 2)), 0.0)
        columns = tl.where(of_column, 1 / (N * tl.sum(kernel * rows[:, :, None], 1)), 0.0)
        if CHANGES:
            now = unit * rows
            total = tl.sum(tl.sum(tl.where(of_row, tl.abs(now - before), 0.0), 1), 0)
            tl.store(changes + program.to(INDEX) * steps + step, total)
            before = now
    if not CHANGES:
        offset = (x[:, None, None] * M + m[None, :, None]) * N + n[None, None, :]
        tl.store(plan + offset, rows[:, :, None] * kernel * columns[:, None, :], mask=inside)


def plan(cost: Tensor, eps: float, iterations: int, tolerance: float | None) -> Tensor:
    """The plans (X, M, N) float32 of costs (X, M, N)."""
    count = torch.full((1,), iterations, dtype=torch.int32, device=cost.device)
    if tolerance is not None:
        small = changes(cost, eps, iterations) < tolerance
        count = torch.where(small.any(), small.int().argmax().int() + 1, count)
    result = torch.empty(cost.shape, dtype=torch.float32, device=cost.device)
    _launch(cost, result, result, count, eps, change=False)
    return result


def changes(cost: Tensor, eps: float, iterations: int) -> Tensor:
    """The mean change of the rows' scaling (iterations,) float32."""
    X, M, N = cost.shape
    programs = triton.cdiv(X, blocks(M, N)["BLOCK_X"])
    sums = torch.empty(programs, iterations, dtype=torch.float32, device=cost.device)
    count = torch.full((1,), iterations, dtype=torch.int32, device=cost.device)
    _launch(cost, sums, sums, count, eps, change=True)
    return sums.sum(0) / max(1, X * M)


def _launch(cost: Tensor, plan: Tensor, changes: Tensor, count: Tensor, eps: float, change: bool) -> None:
    X, M, N = cost.shape
    tiles = blocks(M, N)
    if X > 0:
        sinkhorn_kernel[(triton.cdiv(X, tiles["BLOCK_X"]),)](
            cost, plan, changes, count, eps, X, M, N, *cost.stride(),
            CHANGES=change, LOWEST=LOWEST, INDEX=index_dtype(cost, plan), **tiles,
        )  # fmt: skip


def blocks(M: int, N: int) -> dict[str, int]:
    """Tile sizes and warps: whole problems, as many as TILE holds and at least one."""
    block_m, block_n = triton.next_power_of_2(M), triton.next_power_of_2(N)
    return {"BLOCK_X": max(1, TILE // (block_m * block_n)), "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4}

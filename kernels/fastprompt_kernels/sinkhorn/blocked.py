"""sinkhorn in plain torch for any device: some problems at a time make all their iterations while they are in cache."""

import torch
from torch import Tensor

from ..cores import on_all_cores, parts
from .reference import LOWEST
from .stopping import iterations_until

# The kernels of a tile of problems. With the products that are made of them they fit the second-level cache.
TILE_BYTES = 2**19
# Fewer numbers than this times the iterations are one thread's work.
LITTLE = 2**18


def plan(cost: Tensor, eps: float, iterations: int, tolerance: float | None) -> Tensor:
    """The plans (X, M, N) of costs (X, M, N)."""
    if tolerance is not None:
        iterations = iterations_until(tolerance, iterations, lambda count: changes(cost, eps, count))
    result = torch.empty(cost.shape, dtype=torch.promote_types(cost.dtype, torch.float32), device=cost.device)

    def fill(tile: slice) -> None:
        kernel, rows, columns, _ = _solve(cost[tile].to(result.dtype), eps, iterations, change=False)
        result[tile] = kernel.mul_(rows[:, None]).mul_(columns).permute(2, 0, 1)

    on_all_cores(fill, zip(_tiles(cost.shape, result.itemsize)), cost.device, little=cost.numel() * iterations < LITTLE)
    return result


def changes(cost: Tensor, eps: float, iterations: int) -> Tensor:
    """The mean change of the rows' scaling (iterations,)."""
    dtype = torch.promote_types(cost.dtype, torch.float32)
    tiles = _tiles(cost.shape, dtype.itemsize)
    sums = torch.zeros(len(tiles), iterations, dtype=dtype, device=cost.device)

    def fill(number: int, tile: slice) -> None:
        sums[number] = _solve(cost[tile].to(dtype), eps, iterations, change=True)[3]

    on_all_cores(fill, enumerate(tiles), cost.device, little=cost.numel() * iterations < LITTLE)
    return sums.sum(0) / max(1, cost.shape[0] * cost.shape[1])


def _tiles(shape: torch.Size, itemsize: int) -> list[slice]:
    """The problems (X, M, N), in parts of TILE_BYTES."""
    X, M, N = shape
    return list(parts(X, TILE_BYTES // (M * N * itemsize)))


def _solve(cost: Tensor, eps: float, iterations: int, change: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The shifted kernel (M, N, X), the scaling of its rows (M, X) and columns (N, X), and the changes summed.

    Problems come last, so that sums over M and over N are sums of vectors.
    """
    cost = cost.permute(1, 2, 0)
    M, N, X = cost.shape
    low = cost.amin(1)
    kernel = torch.empty(M, N, X, dtype=cost.dtype, device=cost.device)
    torch.sub(low[:, None], cost, out=kernel).div_(eps).clamp_min_(LOWEST).exp_()
    product = torch.empty_like(kernel)
    columns, rows = kernel.new_ones(N, X), kernel.new_empty(M, X)
    unit, before, sums = (low / eps).exp_(), 1.0, kernel.new_zeros(iterations)
    for step in range(iterations):
        torch.mul(kernel, columns, out=product)
        torch.sum(product, 1, out=rows).reciprocal_().div_(M)
        torch.mul(kernel, rows[:, None], out=product)
        torch.sum(product, 0, out=columns).reciprocal_().div_(N)
        if change:
            now = unit * rows
            sums[step] = (now - before).abs_().sum()
            before = now
    return kernel, rows, columns, sums

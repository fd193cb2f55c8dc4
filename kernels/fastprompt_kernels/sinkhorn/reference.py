"""The definition of sinkhorn, and the oracle of its tests."""

import torch
from torch import Tensor

# The smallest exponent of the kernel: exp(-60) is 1e-26, and products of two such numbers with the scalings, which
# undo one of them, stay within float32.
LOWEST = -60.0


def sinkhorn(cost: Tensor, eps: float, iterations: int, tolerance: float | None) -> tuple[Tensor, Tensor]:
    """The plain loop.

    Args:
        cost: (..., M, N).
        eps: strength of the entropy term.
        iterations: at most.
        tolerance: of the stopping rule, or None.

    Returns:
        The plan (..., M, N), and the mean change of the row scaling in each iteration that was made, in float32 or in
        float64 for float64 inputs.
    """
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    M, N = cost.shape[-2:]
    low = cost.amin(-1, keepdim=True)
    kernel = ((low - cost) / eps).clamp_min(LOWEST).exp()
    unit = (low / eps).exp()  # the scaling of a row of exp(-cost / eps) is that of the shifted row times this
    columns, before, changes = cost.new_ones(*cost.shape[:-2], N, 1), 1.0, []
    for _ in range(iterations):
        rows = 1 / M / (kernel @ columns)
        columns = 1 / N / (kernel.mT @ rows)
        changes.append((unit * rows - before).abs().sum() / max(1, rows.numel()))
        before = unit * rows
        if tolerance is not None and changes[-1] < tolerance:
            break
    return rows * kernel * columns.mT, torch.stack(changes)

"""sinkhorn: entropic transport plans of many small problems at once."""

from math import inf

from torch import Tensor

from ..implementations import check_name
from . import op
from .stopping import iterations_until

__all__ = ["iterations_until", "sinkhorn", "sinkhorn_changes"]


def sinkhorn(
    cost: Tensor, *, eps: float = 0.1, iterations: int = 100, tolerance: float | None = None, impl: str = "auto"
) -> Tensor:
    """The entropic transport plan of every cost matrix, between uniform marginals.

        r = 1/M / (K c),   c = 1/N / (K^T r),   plan[m, n] = r[m] K[m, n] c[n],   K = exp(-cost / eps),   c = 1 at first

    The columns of a plan sum to 1/N exactly (but for rounding), its rows to 1/M the better the more iterations there
    are. With a tolerance this is the transport of PLOT (Chen et al., ICLR 2023, arXiv:2210.01253): iteration stops for
    all problems at once, as soon as r changed by less than the tolerance, on average over all rows of all problems. A
    cost that is not a number then keeps all problems from stopping before the last iteration.

    Small eps is safe: every row is shifted by its smallest cost, which changes no plan, and a cost counts as at most
    60 eps above it. So plans are those of the formula while the costs of every row lie within 60 eps (cosines: eps of
    1/30 or more), and finite, never 0/0, for any eps. The stopping rule looks at r as the formula has it, with K not
    shifted, so it needs costs within 80 eps of 0; all iterations are made where r is infinite.

    The plan has no gradient: the methods that use it take it as constant. It is computed in float32, and in float64
    for float64 costs, and has that dtype.

    Args:
        cost: (..., M, N), finite; M and N at least 1.
        eps: strength of the entropy term, in units of the cost.
        iterations: how many there are, or how many there are at most with a tolerance.
        tolerance: of the stopping rule; None makes all iterations, without waiting for the device.
        impl: "reference" (plain torch, the definition), "blocked" (plain torch, bounded memory, any device), "triton"
            (a kernel that holds problems in registers: CUDA and ROCm, float32, float16 and bfloat16, M times N up to
            4096 where both are rounded up to powers of two), or "auto": triton where it can run, blocked elsewhere.
            What is named explicitly is run or refused, never replaced.

    Returns:
        (..., M, N).

    Raises:
        TypeError: cost is not a floating-point tensor.
        ValueError: a shape or number that does not fit, an unknown name, or an implementation that cannot run here.
    """
    _check(cost, eps, iterations, impl)
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance must be a number above 0 or None, got {tolerance}")
    return op.sinkhorn(cost, float(eps), iterations, tolerance, impl)


def sinkhorn_changes(cost: Tensor, *, eps: float = 0.1, iterations: int = 100, impl: str = "auto") -> Tensor:
    """What the stopping rule of `sinkhorn` looks at: by how much r changes in each iteration, on average over all rows.

    Give their mean over parts of equal size to `iterations_until`, to have the rule over more problems than memory
    holds at once.

    Args:
        cost: as in sinkhorn, like eps and impl.
        eps: strength of the entropy term.
        iterations: how many to make.
        impl: the implementation.

    Returns:
        (iterations,); zeros without any problem.

    Raises:
        TypeError, ValueError: as in sinkhorn.
    """
    _check(cost, eps, iterations, impl)
    return op.sinkhorn_changes(cost, float(eps), iterations, impl)


def _check(cost: Tensor, eps: float, iterations: int, impl: str) -> None:
    if not isinstance(cost, Tensor) or not cost.is_floating_point():
        found = cost.dtype if isinstance(cost, Tensor) else type(cost).__name__
        raise TypeError(f"cost must be a floating-point tensor, got {found}")
    if cost.ndim < 2 or 0 in cost.shape[-2:]:
        raise ValueError(f"cost must have shape (..., M, N) with M and N at least 1, got {tuple(cost.shape)}")
    if not 0 < eps < inf:
        raise ValueError(f"eps must be a finite number above 0, got {eps}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    check_name(impl)

"""The stopping rule of PLOT, for problems that are not all in memory at once."""

from collections.abc import Callable

from torch import Tensor

# Costs that are differences of cosines, at eps 0.1, stop after about as many.
FIRST_LOOK = 8


def iterations_until(tolerance: float, iterations: int, changes: Callable[[int], Tensor]) -> int:
    """How many iterations are made until the rows change by less than the tolerance.

    Looks at twice as many iterations each time, from the start: that costs a few iterations more than to go on from
    where the last look ended, and nothing has to be kept.

    Args:
        tolerance: of the stopping rule.
        iterations: at most.
        changes: for a number of iterations the change in each of them, on average over all problems.
    """
    look = min(FIRST_LOOK, iterations)
    while True:
        small = (changes(look) < tolerance).nonzero()
        if len(small):
            return int(small[0]) + 1
        if look == iterations:
            return iterations
        look = min(2 * look, iterations)

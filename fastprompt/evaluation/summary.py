"""Several seeds as one number with a spread, and the rows that tables are made of."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from fastprompt.errors import InputError


@dataclass(frozen=True)
class Summary:
    """Mean and spread of one measure over seeds.

    Attributes:
        mean: mean over the seeds.
        deviation: sample standard deviation (divided by n - 1); None for a single seed.
        count: number of seeds, n.
    """

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Summary":
        """Summarise one value a seed; InputError if there is none."""
        values = [float(value) for value in values]
        if not values:
            raise InputError("values must hold one number a seed, got none.")
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))


Cell = Summary | float | str | None  # None: not measured


@dataclass(frozen=True)
class Row:
    """One line of a table: what it is about, and one cell a column."""

    label: str
    cells: tuple[Cell, ...]

"""Numbers in the results of a run, by what they are called there; None for what was not measured on a GPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import store


@dataclass(frozen=True)
class Found:
    """The results in a folder.

    Attributes:
        out: the folder.
    """

    out: Path

    @property
    def rehearsed(self) -> bool:
        """Whether a processor made them, so that no number in them is one of a GPU."""
        file = self.out / "plan.json"
        return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8"))["rehearse"])

    def rows(self, step: str, item: str = "", **wanted: object) -> Iterator[dict]:
        """The rows of a step, of items whose names begin so, with these entries."""
        for name, one in store.items(self.out, step).items():
            if name.startswith(item):
                yield from (row for row in one.rows if all(row.get(key) == value for key, value in wanted.items()))

    def number(self, key: str, step: str, item: str = "", **wanted: object) -> float | None:
        """A number of the first such row, if a GPU made it."""
        if self.rehearsed:
            return None
        return next((row[key] for row in self.rows(step, item, **wanted) if row.get(key) is not None), None)

"""One table, written as plain text for the terminal, as Markdown, and cell by cell for the HTML page."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from fastprompt.errors import InputError
from fastprompt.evaluation.summary import Cell, Row, Summary

NOT_MEASURED = "–"
LEGEND = "* best of its column"


@dataclass(frozen=True)
class Column:
    """One measure.

    Attributes:
        title: its name.
        unit: its unit as written behind the name, such as "%" or "s"; empty for none.
        format: a format specification for numbers, such as ".1f".
        scale: what numbers are multiplied by before they are written; 100 turns fractions into per cent.
        higher_is_better: which end is marked as the best; None marks nothing.
    """

    title: str
    unit: str = ""
    format: str = ".1f"
    scale: float = 1.0
    higher_is_better: bool | None = None

    @property
    def heading(self) -> str:
        """Title and unit in one line."""
        return f"{self.title} ({self.unit})" if self.unit else self.title


@dataclass(frozen=True)
class TextCell:
    """A cell as it is shown.

    Attributes:
        text: the number or the words.
        spread: the standard deviation, without the ± sign; empty if there is none.
        best: whether it is the best of its column, and not all of them look equal.
    """

    text: str
    spread: str = ""
    best: bool = False

    def __str__(self) -> str:
        """Mean ± deviation."""
        return f"{self.text} ± {self.spread}" if self.spread else self.text


@dataclass(frozen=True)
class Table:
    """Rows of measures under titled columns. The best value of every column is marked.

    Attributes:
        title: what the table shows.
        columns: the measures.
        rows: one line each, with as many cells as there are columns.
        label_title: heading of the column of row labels.
        note: a sentence below the table; empty for none.

    Raises:
        InputError: a row has more or fewer cells than there are columns.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    label_title: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                counts = f"{len(self.columns)} cells, got {len(row.cells)}"
                raise InputError(f"Row {row.label!r} of table {self.title!r} must have {counts}.")

    def shown(self) -> list[list[TextCell]]:
        """The cells as they are shown, one list a row. What looks equal to the best is marked with it."""
        columns = self._shown_columns()
        return [[cells[i] for cells in columns] for i in range(len(self.rows))]

    def to_text(self) -> str:
        """The table for a terminal; a star, which a legend explains, follows the best value of a column."""
        columns = [_aligned([self.label_title, *(row.label for row in self.rows)], str.ljust)]
        for column, cells in zip(self.columns, self._shown_columns(), strict=True):
            # Spread and star have places of their own, so that the numbers stand below each other.
            spreads = _aligned([f" ± {cell.spread}" if cell.spread else "" for cell in cells], str.ljust)
            stars = ["*" if cell.best else " " for cell in cells]
            texts = [cell.text + spread + star for cell, spread, star in zip(cells, spreads, stars, strict=True)]
            columns.append(_aligned([f"{column.heading} ", *texts], str.rjust))
        header, *lines = ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]
        rule = "─" * max(map(len, [header, *lines]))
        starred = any(cell.best for cells in self.shown() for cell in cells)
        below = [text for text in (LEGEND if starred else "", self.note) if text]
        return "\n".join([self.title, "", header, rule, *lines, *([rule, *below] if below else [])])

    def to_markdown(self) -> str:
        """The table in Markdown; the best value of a column is bold."""
        lines = [
            [_escaped(self.label_title), *(_escaped(column.heading) for column in self.columns)],
            ["---", *("---:" for _ in self.columns)],
        ]
        for row, cells in zip(self.rows, self.shown(), strict=True):
            texts = [f"**{_escaped(str(cell))}**" if cell.best else _escaped(str(cell)) for cell in cells]
            lines.append([_escaped(row.label), *texts])
        body = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([f"**{_escaped(self.title)}**", "", *body, *(["", _escaped(self.note)] if self.note else [])])

    def _shown_columns(self) -> list[list[TextCell]]:
        return [_shown_column(column, [row.cells[i] for row in self.rows]) for i, column in enumerate(self.columns)]


def _shown_column(column: Column, cells: list[Cell]) -> list[TextCell]:
    """The cells of one column in text, with the best marked where it is better than another."""
    shown = [_shown_cell(column, cell) for cell in cells]
    values = [_value(cell) for cell in cells]
    numbers = [value for value in values if math.isfinite(value)]
    if column.higher_is_better is None or not numbers:
        return shown
    best = max(numbers) if column.higher_is_better else min(numbers)
    best_text = _number(column, best)
    if all(_number(column, value) == best_text for value in numbers):
        return shown  # none of them is better than another
    return [
        TextCell(cell.text, cell.spread, best=math.isfinite(value) and cell.text == best_text)
        for cell, value in zip(shown, values, strict=True)
    ]


def _shown_cell(column: Column, cell: Cell) -> TextCell:
    if cell is None:
        return TextCell(NOT_MEASURED)
    if isinstance(cell, str):
        return TextCell(cell)
    if isinstance(cell, Summary):
        spread = "" if cell.deviation is None else _number(column, cell.deviation)
        return TextCell(_number(column, cell.mean), spread)
    return TextCell(_number(column, cell))


def _value(cell: Cell) -> float:
    """The number of a cell; NaN if it has none."""
    if isinstance(cell, Summary):
        return cell.mean
    return float(cell) if isinstance(cell, int | float) else math.nan


def _number(column: Column, value: float) -> str:
    return format(value * column.scale, column.format)


def _aligned(texts: list[str], align: Callable[[str, int], str]) -> list[str]:
    width = max(map(len, texts), default=0)
    return [align(text, width) for text in texts]


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|&])", r"\\\1", text.replace("\n", " "))

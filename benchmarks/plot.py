"""Growth of time and memory with the size of the problem, drawn from the rows of results."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, NullLocator

from benchmarks.measure import Benchmark
from benchmarks.results import read_rows
from fastprompt.errors import InputError
from fastprompt.report.style import INK, PALETTE, new_figure, style_axes

Rows = list[dict[str, str]]

# What is drawn: column, title, and whether floors have it.
_MEASURES = (
    ("median_ms", "Milliseconds", True),
    ("extra_memory_mb", "MB beyond inputs and results", False),
    ("over_floor", "Time over the slowest floor", False),
)
_AXES = {"B": "Images B", "C": "Classes C", "P": "Patches P", "k": "Largest k"}
_MARKERS = "os^DvP"


def draw_growth(benchmark: Benchmark, folder: Path) -> list[Path]:
    """Draw ``<name>.csv`` of a folder, one picture for each device, precision and pass, beside the file.

    Of rows that differ only in when and with what versions they were measured, the newest counts.

    Raises:
        InputError: there is no such file, or no parameter takes two values while the others stay equal.
    """
    rows = read_rows(folder / f"{benchmark.name}.csv")
    shape = [name for name in benchmark.shapes["cpu"][0] if name not in benchmark.labels]
    written = []
    for picture in dict.fromkeys(_picture(row) for row in rows):
        of_picture = [row for row in rows if _picture(row) == picture]
        found = [(axis, swept) for axis in benchmark.sweeps if (swept := _swept(shape, axis, of_picture))]
        if found:
            slug = re.sub(r"[^a-z0-9]+", "-", " ".join(filter(None, picture)).lower()).strip("-")
            path = folder / f"{benchmark.name}-{slug}.png"
            _figure(f"{benchmark.title}\n{', '.join(filter(None, picture))}", shape, found).savefig(path, dpi=130)
            written.append(path)
    if not written:
        swept = " or ".join(benchmark.sweeps)
        raise InputError(f"{folder / benchmark.name}.csv has no two rows that differ in {swept} alone: nothing to draw")
    return written


def _picture(row: dict[str, str]) -> tuple[str, ...]:
    return row["device"], row["dtype"], row.get("pass", "")


def _swept(shape: list[str], axis: str, rows: Rows) -> Rows:
    """The rows in which the axis takes most values while all else stays equal; none if it takes one only.

    Of several such groups the one whose rows are the newest, the oldest of them compared.
    """
    fixed = ["threads", *(name for name in shape if name != axis)]
    groups: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in fixed), []).append(row)

    def values_and_age(group: Rows) -> tuple[int, str]:
        newest = {row[axis]: row["date"] for row in group}  # the last row is the newest
        return len(newest), min(newest.values())

    most = max(groups.values(), key=values_and_age)
    return most if len({row[axis] for row in most}) > 1 else []


def _figure(title: str, shape: list[str], found: list[tuple[str, Rows]]) -> Figure:
    """A column of panels for each swept parameter, a row for each measure that any of the rows has."""
    measures = [one for one in _MEASURES if any(row[one[0]] for _, rows in found for row in rows)]
    names = list(dict.fromkeys(name for axis, rows in found for name in _grown(axis, rows)))
    looks = dict(zip(names, _looks(names), strict=True))
    figure = new_figure(1.2 + 2.9 * max(len(found), 2), 1.1 + 2.5 * len(measures))
    figure.set_layout_engine("constrained")
    figure.suptitle(title, fontsize=9, color=INK)
    panels = figure.subplots(len(measures), len(found), squeeze=False, sharey="row")
    for line, (column, label, with_floors) in zip(panels, measures, strict=True):
        line[0].set_ylabel(label, fontsize=8, color=INK)
        for axes, (axis, rows) in zip(line, found, strict=True):
            drawn = {name: look for name, look in looks.items() if with_floors or not _is_floor(name)}
            _panel(axes, axis, column, rows, drawn)
        _finish(line[0], column)  # once all panels of the line have had their say about its ends
    for axes, (axis, rows) in zip(panels[0], found, strict=True):
        others = [name for name in shape if name not in ("dtype", "pass", axis)]
        axes.set_title(", ".join(f"{name}={rows[-1][name]}" for name in others), fontsize=8, color=INK)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False,
                  fontsize=8, labelcolor=INK)  # fmt: skip
    return figure


def _grown(axis: str, rows: Rows) -> list[str]:
    """The implementations measured with more than one value of the axis: what was measured once shows no growth."""
    names = dict.fromkeys(row["implementation"] for row in rows)
    return [name for name in names if len({row[axis] for row in rows if row["implementation"] == name}) > 1]


def _panel(axes: Axes, axis: str, column: str, rows: Rows, drawn: dict[str, dict[str, str]]) -> None:
    style_axes(axes)
    axes.set_xscale("log")
    if column != "over_floor":  # what needs no memory of its own stands on the axis
        axes.set_yscale("symlog" if column == "extra_memory_mb" else "log", subs=(2, 5))
    axes.tick_params(which="minor", colors=INK, labelsize=6)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel(_AXES[axis], fontsize=8, color=INK)
    ticks = sorted({int(row[axis]) for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    for name, look in drawn.items():
        newest = {int(row[axis]): row for row in rows if row["implementation"] == name}  # the last row is the newest
        points = sorted((x, row) for x, row in newest.items() if row[column])
        x = [x for x, _ in points]
        axes.plot(x, [float(row[column]) for _, row in points], label=name, linewidth=1.5, markersize=4, **look)
        if column == "median_ms":
            low, high = ([float(row[key]) for _, row in points] for key in ("p20_ms", "p80_ms"))
            axes.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)


def _finish(axes: Axes, column: str) -> None:
    """The vertical axis of a line of panels, which share it."""
    low, high = axes.get_ylim()
    if column == "over_floor":
        axes.set_ylim(bottom=0)
    elif high < 10 * low:  # so narrow a range may hold no two of 1, 2, 5 and 10
        axes.yaxis.set_major_locator(AutoLocator())
        axes.yaxis.set_minor_locator(NullLocator())


def _looks(names: list[str]) -> Iterator[dict[str, str]]:
    """Colour, marker and line of each: floors are grey, so that the palette lasts."""
    real = [name for name in names if not _is_floor(name)]
    styles = dict(zip(real, zip(PALETTE, _MARKERS, strict=True), strict=False))
    lines = iter((":", "--"))
    for name in names:
        if name in styles:
            yield {"color": styles[name][0], "marker": styles[name][1]}
        else:
            yield {"color": INK, "linestyle": next(lines)}


def _is_floor(name: str) -> bool:
    return name.startswith("floor")

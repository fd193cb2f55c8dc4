"""Growth of time and memory with the number of classes, drawn from the rows of results."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.measure import Benchmark
from fastprompt.errors import InputError
from fastprompt.report.style import INK, PALETTE, new_figure, style_axes

Rows = list[dict[str, str]]


def draw_growth(benchmark: Benchmark, folder: Path) -> list[Path]:
    """Draw ``<name>.csv`` of a folder as ``<name>-<device>.png`` beside it, one picture a device.

    Of rows that differ only in when they were measured, the newest counts.

    Raises:
        InputError: there is no such file.
    """
    source = folder / f"{benchmark.name}.csv"
    if not source.is_file():
        raise InputError(f"{source} does not exist: run 'python -m benchmarks {benchmark.name}' first")
    with source.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    written = []
    for device in dict.fromkeys(row["device"] for row in rows):
        of_device = [row for row in rows if row["device"] == device]
        slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
        path = folder / f"{benchmark.name}-{slug}.png"
        _figure(benchmark, device, of_device).savefig(path, dpi=160)
        written.append(path)
    return written


def _figure(benchmark: Benchmark, device: str, rows: Rows) -> Figure:
    """Time at the left, memory at the right; one line of panels for each setting of ``benchmark.panels``."""
    fixed = ("dtype", "threads", *benchmark.panels)
    panels: dict[tuple[str, ...], Rows] = {}
    for row in rows:
        panels.setdefault(tuple(row[key] for key in fixed), []).append(row)
    figure = new_figure(9.5, 1.0 + 2.9 * len(panels))
    figure.set_layout_engine("constrained")
    figure.suptitle(f"{benchmark.title}\n{device}", fontsize=9, color=INK)
    grid = figure.subplots(len(panels), 2, squeeze=False)
    for (setting, of_panel), (time_axes, memory_axes) in zip(panels.items(), grid, strict=True):
        label = ", ".join(f"{key}={value}" for key, value in zip(fixed, setting, strict=True))
        _style(time_axes, f"Milliseconds ({label})")
        _style(memory_axes, "Peak memory beyond the inputs (MB)")
        for name, color in zip(dict.fromkeys(row["implementation"] for row in of_panel), PALETTE, strict=False):
            _draw(time_axes, memory_axes, name, color, [row for row in of_panel if row["implementation"] == name])
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False,
                  fontsize=8, labelcolor=INK)  # fmt: skip
    return figure


def _style(axes: Axes, title: str) -> None:
    style_axes(axes)
    axes.set(xscale="log", yscale="log")
    axes.tick_params(which="minor", colors=INK, labelsize=7)
    axes.set_title(title, loc="left", fontsize=8, color=INK)
    axes.set_xlabel("Classes", fontsize=8, color=INK)


def _draw(time_axes: Axes, memory_axes: Axes, name: str, color: str, rows: Rows) -> None:
    newest = {int(row["C"]): row for row in rows}  # rows are appended: the last one is the newest
    classes = sorted(newest)
    median, p20, p80 = ([float(newest[C][key]) for C in classes] for key in ("median_ms", "p20_ms", "p80_ms"))
    time_axes.plot(classes, median, color=color, linewidth=1.6, marker="o", markersize=3, label=name)
    time_axes.fill_between(classes, p20, p80, color=color, alpha=0.2, linewidth=0)
    weighed = [C for C in classes if newest[C]["peak_memory_mb"]]
    peaks = [float(newest[C]["peak_memory_mb"]) for C in weighed]
    memory_axes.plot(weighed, peaks, color=color, linewidth=1.6, marker="o", markersize=3)
    for axes in (time_axes, memory_axes):
        axes.set_xticks(classes, [str(C) for C in classes])
        axes.set_xticks([], minor=True)

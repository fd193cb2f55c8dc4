"""Draws the pictures of docs/kernels.md beside this file: python docs/images/draw_kernels.py."""

import csv
from collections.abc import Iterator
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from fastprompt.report.style import INK, PALETTE, new_figure, style_axes

FOLDER = Path(__file__).parent
TABLE = FOLDER.parents[1] / "benchmarks" / "results" / "kernel_resources.csv"
# How many instructions there is time for on an element, and for each unit of D, while an H200 computes the product: 64
# a clock on 132 multiprocessors at 1.755 GHz, beside 790 TFLOP/s. An estimate, not a measurement.
BUDGET = 2 / 790e12 * 132 * 64 * 1.755e9
# The rows of the table that are drawn.
DRAWN = {"kernel": "forward_kernel", "target": "sm_90", "dtype": "bf16", "patches": "256", "scales": "1"}


def draw_tile() -> None:
    """What one program of the forward kernel reads, holds and writes."""
    figure = new_figure(9.5, 4.3)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 95), ylim=(0, 43))
    axes.axis("off")
    _box(axes, 2, 9, 8, 16, PALETTE[0], "prompts\n64 classes\nx D")
    _box(axes, 15, 29, 32, 7, PALETTE[2], "patches of one image: D x 256")
    _box(axes, 15, 9, 24.5, 16, PALETTE[1], "similarity\n64 x 196 of float32\n64 columns of a row in a thread")
    _box(axes, 39.5, 9, 7.5, 16, INK, "no patch:\n-inf")
    _box(axes, 54, 9, 8, 16, PALETTE[1], "sorted\nrun of K\nfor every\nrow")
    _box(axes, 70, 18, 22, 7, PALETTE[4], "values: 4 bytes a row")
    _box(axes, 70, 9, 22, 7, PALETTE[4], "selection: 32 bytes a row\nand scale, for training only")
    inner = ((10, 17), (15, 17)), ((31, 29), (31, 25)), ((47, 17), (54, 17))
    for start, end in (*inner, ((62, 20.5), (70, 21.5)), ((62, 13.5), (70, 12.5))):
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": INK, "linewidth": 1})
    _label(axes, 12.5, 19.2, "tensor\ncores")
    _label(axes, 50.5, 19.2, "network")
    _label(axes, 66, 23.2, "means")
    _label(axes, 66, 10, "last of\nthe k")
    for left, right, text in ((14.5, 62.5, "registers"), (69.5, 92.5, "written to memory")):
        axes.plot([left, left, right, right], [6.6, 5.6, 5.6, 6.6], color=INK, linewidth=0.8)
        _label(axes, (left + right) / 2, 3.4, text)
    _label(axes, 31, 38.6, "read in steps of 32 of D, through shared memory")
    _label(axes, 6, 27, "read likewise")
    figure.savefig(FOLDER / "kernels-tile.png", dpi=130)


def network() -> Iterator[list[tuple[int, int, bool]]]:
    """The steps that find the 4 largest of 16 columns; a compare-exchange is (upper wire, lower, both are kept)."""
    yield from ([(4 * g + a, 4 * g + b, True) for g in range(4) for a, b in step]
                for step in ([(0, 1), (2, 3)], [(0, 2), (1, 3)], [(1, 2)]))  # fmt: skip
    for firsts, distance in (((0, 8), 4), ((0,), 8)):
        yield [(first + i, first + distance + 3 - i, False) for first in firsts for i in range(4)]
        for step in ([(0, 2), (1, 3)], [(0, 1), (2, 3)]):
            yield [(first + a, first + b, True) for first in firsts for a, b in step]


def draw_network(row: list[int]) -> None:
    """The network at work on one row of 16 numbers."""
    figure = new_figure(7.6, 5.6)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-1.5, 25.5), ylim=(-19.2, 3.2))
    axes.axis("off")
    values, x, start = dict(enumerate(row)), 1.5, 0.7
    _values(axes, 0, values)
    for number, step in enumerate(network()):
        if number in (3, 6):
            x, start = _interval(axes, x, start, values)
        for place, (upper, lower, both) in enumerate(step):
            at, high, low = x + _shift(step, place), _height(upper), _height(lower)
            axes.plot([at, at], [high, low], "o-", color=INK, linewidth=1, markersize=4, markevery=1 if both else [0])
            values[upper], least = max(values[upper], values[lower]), min(values[upper], values[lower])
            if both:
                values[lower] = least
            else:
                axes.plot([at], [low], "x", color=INK, markersize=6)
                del values[lower]
                _wire(axes, lower, start, at)
        x += 1.3 + max(_shift(step, place) for place in range(len(step)))
    _interval(axes, x, start, values)
    assert list(values.values()) == sorted(row, reverse=True)[:4]
    _label(axes, 2.9, 1.9, "sort four\nruns at once")
    _label(axes, 11.2, 1.9, "the larger halves\nof two pairs")
    _label(axes, 20.6, 1.9, "of the last pair,\nacross threads")
    figure.savefig(FOLDER / "kernels-network.png", dpi=130)


def counted(keep: bool) -> list[tuple[int, float]]:
    """Read K and its instructions an element, with or without the selection bits."""
    with TABLE.open(newline="") as handle:
        table = [row for row in csv.DictReader(handle) if DRAWN.items() <= row.items() and "INDEX" not in row["blocks"]]
    return [
        (int(row["k"]), float(row["per_element"])) for row in table if row["keep"] == str(keep) and row["per_element"]
    ]


def draw_instructions() -> None:
    """Draw counted instructions of the selection beside what the tensor cores leave time for.

    The numbers stand in the file, too, where a test compares them with the table.
    """
    figure = new_figure(7.5, 3.8)
    axes = figure.add_axes((0.09, 0.14, 0.7, 0.8))
    style_axes(axes)
    for place, text in enumerate(("selection alone", "and selection bits written")):
        counts = counted(keep=bool(place))
        at = [k.bit_length() - 3 + 0.36 * (place - 0.5) for k, _ in counts]
        axes.bar(at, [count for _, count in counts], 0.34, color=PALETTE[place], label=text)
        for x, (_, count) in zip(at, counts, strict=True):
            axes.text(x, count + 0.5, f"{count:.1f}", ha="center", color=INK, fontsize=8)
    for D in (512, 768, 1024):
        axes.axhline(D * BUDGET, color=INK, linewidth=1, linestyle="--", zorder=0)
        axes.text(3.55, D * BUDGET, f"product, D = {D}", va="center", color=INK, fontsize=8)
    axes.set_xticks(range(4), ["K = 4", "8", "16", "32"])
    axes.set_ylabel("instructions an element", color=INK, fontsize=9)
    axes.set(xlim=(-0.5, 3.5), ylim=(0, 42))
    axes.legend(frameon=False, labelcolor=INK, fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.9))
    numbers = {"Description": str([counted(keep=False), counted(keep=True)])}
    figure.savefig(FOLDER / "kernels-instructions.png", dpi=130, metadata=numbers)


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, alpha=0.18, linewidth=0))
    axes.add_patch(Rectangle((x, y), width, height, facecolor="none", edgecolor=colour, linewidth=1.2))
    _label(axes, x + width / 2, y + height / 2, text)


def _label(axes: Axes, x: float, y: float, text: str) -> None:
    axes.text(x, y, text, ha="center", va="center", color=INK, fontsize=8.5)


def _height(wire: int) -> float:
    return -wire - 0.9 * (wire // 4)


def _shift(step: list[tuple[int, int, bool]], place: int) -> float:
    """How far right a line stands of the first of its step: those that would overlap stand side by side."""
    upper, lower, _ = step[place]
    return 0.75 * sum(first < upper < last or upper < first < lower for first, last, _ in step[:place])


def _wire(axes: Axes, wire: int, start: float, end: float) -> None:
    axes.plot([start, end], [_height(wire)] * 2, color=PALETTE[wire % 4], linewidth=1.4, zorder=1)


def _interval(axes: Axes, x: float, start: float, values: dict[int, int]) -> tuple[float, float]:
    """End the wires, write the values that they hold, and say where steps and wires go on."""
    for wire in values:
        _wire(axes, wire, start, x - 0.4)
    _values(axes, x + 0.3, values)
    return x + 2, x + 1


def _values(axes: Axes, x: float, values: dict[int, int]) -> None:
    for wire, value in values.items():
        axes.text(x, _height(wire), str(value), ha="center", va="center", color=INK, fontsize=8.5, zorder=5)


if __name__ == "__main__":
    draw_tile()
    draw_network([31, 74, 12, 58, 90, 27, 66, 43, 5, 81, 39, 97, 62, 18, 50, 85])
    draw_instructions()

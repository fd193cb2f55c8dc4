"""What all figures share: colours, text size, drawing without pyplot's global state, and the extra they need."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from fastprompt.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which stay apart for colour-blind readers, in an order that also does so in print.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

# Figures have no background of their own; this grey can be read on white and on a dark page.
INK = "#757b85"


def require_extra() -> None:
    """Raise ``InputError`` where matplotlib or Jinja2 is not installed: a plain installation trains without them."""
    for package in ("matplotlib", "jinja2"):
        if find_spec(package) is None:
            raise InputError(f"figures and pages: expected the package {package!r}: pip install 'fastprompt[report]'")


def new_figure(width: float, height: float) -> Figure:
    """Make an empty figure of so many inches that draws itself with Agg and lets the page shine through."""
    require_extra()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="none")
    FigureCanvasAgg(figure)
    return figure


def style_axes(axes: Axes) -> None:
    """Thin grey lines at the left and below, a faint horizontal grid, nothing else."""
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=INK, linewidth=0.6)
    axes.tick_params(colors=INK, width=0.6, length=3, labelsize=8)
    axes.grid(axis="y", color=INK, alpha=0.25, linewidth=0.5)
    axes.set_axisbelow(True)

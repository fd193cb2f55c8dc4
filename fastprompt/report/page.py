"""One self-contained HTML page a run: no scripts, no other files, nothing from the network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fastprompt.files import write_file
from fastprompt.report.style import require_extra
from fastprompt.report.table import Table
from fastprompt.version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class CaptionedFigure:
    """A figure across the page, with what it shows in a sentence or two."""

    figure: Figure
    caption: str


@dataclass(frozen=True)
class GalleryItem:
    """A picture of the test set with what the model made of it.

    Attributes:
        figure: the picture, such as `draw_selected_patches` returns.
        class_name: the class that the picture is labelled with.
        predicted: the class that the model chose.
        caption: anything else worth saying; empty for nothing.
    """

    figure: Figure
    class_name: str
    predicted: str
    caption: str = ""

    @property
    def correct(self) -> bool:
        """Whether the model chose the labelled class."""
        return self.predicted == self.class_name


@dataclass(frozen=True)
class Report:
    """What goes on the page. All text is plain text: markup in it is shown, not obeyed.

    Attributes:
        title: the heading.
        summary: what was done and what came out, in a few sentences; a blank line starts a new paragraph.
        tables: the results.
        figures: such as training curves.
        gallery: pictures with predictions.
        notes: one paragraph each, such as how test and pretraining data were kept apart.
        facts: what was run, in titled groups of names and values, such as {"Configuration": {"shots": 4}}.
    """

    title: str
    summary: str
    tables: tuple[Table, ...] = ()
    figures: tuple[CaptionedFigure, ...] = ()
    gallery: tuple[GalleryItem, ...] = ()
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Mapping[str, object]] = field(default_factory=dict)


def render_report(report: Report) -> str:
    """Render the page as one string of HTML. The same report gives the same page.

    Raises:
        InputError: the packages of the extra "report" are not installed.
    """
    require_extra()
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fastprompt.report", package_path=""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(data_uri=_data_uri, css_width=_css_width)
    template = environment.get_template("page.html.j2")
    paragraphs = [text for text in report.summary.split("\n\n") if text.strip()]
    return template.render(report=report, paragraphs=paragraphs, version=__version__)


def write_report(report: Report, path: Path | str) -> None:
    """Write the page, making its folder if need be. A reader never sees half a page: it appears at once or not at all.

    Args:
        report: what to write.
        path: the HTML file; one that exists is replaced.
    """
    path = Path(path)
    html = render_report(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, html)


def _data_uri(figure: Figure) -> str:
    """The figure itself as an address: line drawings as SVG, what contains pictures as PNG."""
    buffer = io.BytesIO()
    if any(axes.images for axes in figure.axes):
        kind = "image/png"
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    else:
        kind = "image/svg+xml"
        import matplotlib as mpl

        with mpl.rc_context({"svg.hashsalt": "fastprompt"}):  # else every element gets a random name
            figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f"data:{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _css_width(figure: Figure) -> int:
    """Width in CSS pixels, of which an inch has 96, so that text in figures has the size of text around them."""
    return round(96 * figure.get_figwidth())

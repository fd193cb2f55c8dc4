import base64
import io
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from fastprompt.evaluation import Row, Summary
from fastprompt.report import (
    CaptionedFigure,
    Column,
    GalleryItem,
    Report,
    Table,
    TrainingCurve,
    draw_selected_patches,
    draw_training_curves,
    render_report,
    write_report,
)

NASTY = '<script>alert("x")</script> & <b>'


class Page(HTMLParser):
    """Checks that tags nest, and collects texts and addresses."""

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.texts, self.addresses, self.attributes = [], [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if data.strip():
            self.texts.append(" ".join(data.split()))


@pytest.fixture(scope="module")
def report():
    selected = np.array([[True, False, False, False]])
    columns = (Column("Accuracy", "%", scale=100, higher_is_better=True), Column("Time", "s"))
    rows = (Row("CoOp", (Summary(0.7, 0.012, 3), 3.0)), Row(NASTY, (Summary(0.81, 0.004, 3), None)))

    def item(predicted):
        heatmap = draw_selected_patches(Image.new("RGB", (32, 32), "red"), selected, (2, 2), ["k = 1"])
        return GalleryItem(heatmap, NASTY, predicted, NASTY)

    return Report(
        title=NASTY,
        summary=f"First.\n\n{NASTY}",
        tables=(Table(NASTY, columns, rows, NASTY, NASTY),),
        figures=(CaptionedFigure(draw_training_curves([TrainingCurve("CoOp", [[2.0, 1.0]], [[0.1, 0.2]])]), NASTY),),
        gallery=(item(NASTY), item("cat")),
        notes=(NASTY,),
        facts={NASTY: {NASTY: NASTY}},
    )


@pytest.fixture(scope="module")
def html(report):
    return render_report(report)


def test_page_is_well_formed_and_self_contained(html):
    page = Page(html)
    assert len(page.addresses) == 3
    assert all(address.startswith("data:image/") for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "embed"} & set(page.tags)
    outside = re.sub(r"data:image/[a-z+]+;base64,[A-Za-z0-9+/=]+", "", html)
    assert not re.search(r"https?:|//[a-z]|url\(|@import", outside)


def test_markup_in_every_text_is_shown_not_obeyed(html):
    page = Page(html)
    assert "script" not in page.tags
    assert "<script>" not in html
    # Title twice, summary, table (title, label, row, note), caption, 2 classes, 1 prediction, 2 captions, note, facts.
    assert sum(text == NASTY for text in page.texts) == 2 + 1 + 4 + 1 + 2 + 1 + 2 + 1 + 3
    alternatives = [value for name, value in page.attributes if name == "alt"]
    assert len(alternatives) == 3 and all(NASTY in value for value in alternatives)


def test_figures_are_in_the_page(html):
    kinds = [address.split(";")[0] for address in Page(html).addresses]
    assert kinds == ["data:image/svg+xml", "data:image/png", "data:image/png"]
    curve, heatmap, _ = (base64.b64decode(address.split(",")[1]) for address in Page(html).addresses)
    assert b"<svg" in curve
    picture = np.asarray(Image.open(io.BytesIO(heatmap)).convert("RGB")).reshape(-1, 3)
    assert (picture == (255, 0, 0)).all(axis=1).mean() > 0.2, "the red picture fills the first of two panels"


def test_numbers_verdicts_and_facts_are_in_the_page(html):
    texts = Page(html).texts
    for expected in ("70.0", "± 1.2", "81.0", "± 0.4", "3.0", "–", "✓ correct", "✗ wrong", "cat", "First."):
        assert expected in texts
    assert re.findall(r'class="best">([^<]*)<', html) == ["81.0"]


def test_the_same_report_gives_the_same_page(report, html):
    assert render_report(report) == html


def test_empty_sections_are_left_out():
    page = Page(render_report(Report("Title", "Summary.")))
    assert "h2" not in page.tags
    assert {"Title", "Summary."} <= set(page.texts)


def test_page_is_written_whole_or_not_at_all(tmp_path, report, html):
    path = tmp_path / "runs" / "report.html"
    write_report(Report("Old", ""), path)
    broken = Report("New", "", figures=(CaptionedFigure(None, "no figure"),))
    with pytest.raises(AttributeError):
        write_report(broken, path)
    assert "Old" in path.read_text(encoding="utf-8")
    write_report(report, str(path))
    assert path.read_text(encoding="utf-8") == html
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]


@pytest.mark.slow
def test_imports_are_cheap():
    code = (
        "import sys, fastprompt, fastprompt.evaluation\n"
        "assert 'matplotlib' not in sys.modules and 'torchmetrics' not in sys.modules\n"
        "import fastprompt.report\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

import math

import pytest

from fastprompt.errors import InputError
from fastprompt.evaluation import Row, Summary
from fastprompt.report import MEASURES, Column, Table

ACCURACY = Column("Accuracy", "%", ".1f", scale=100, higher_is_better=True)
FPR = Column("FPR95", "%", ".1f", scale=100, higher_is_better=False)
SECONDS = Column("Time", "s", ".0f")


def table(*rows, columns=(ACCURACY, FPR, SECONDS), note=""):
    return Table("Results", columns, tuple(Row(label, cells) for label, cells in rows), "Method", note)


EXAMPLE = table(
    ("CoOp", (Summary(0.705, 0.0123, 3), 0.4, 12.3)),
    ("GalLoP", (Summary(0.81, 0.0049, 3), 0.25, 15.0)),
    ("Zero-shot CLIP", (Summary(0.6, None, 1), None, "none")),
    note="3 seeds.",
)


def test_plain_text_is_aligned_and_marked():
    assert EXAMPLE.to_text().splitlines() == [
        "Results",
        "",
        "Method          Accuracy (%)   FPR95 (%)   Time (s)",
        "───────────────────────────────────────────────────",
        "CoOp              70.5 ± 1.2        40.0         12",
        "GalLoP            81.0 ± 0.5*       25.0*        15",
        "Zero-shot CLIP    60.0                 –       none",
        "───────────────────────────────────────────────────",
        "* best of its column",
        "3 seeds.",
    ]


def test_markdown_is_bold_where_best():
    assert EXAMPLE.to_markdown().splitlines() == [
        "**Results**",
        "",
        "| Method | Accuracy (%) | FPR95 (%) | Time (s) |",
        "| --- | ---: | ---: | ---: |",
        "| CoOp | 70.5 ± 1.2 | 40.0 | 12 |",
        "| GalLoP | **81.0 ± 0.5** | **25.0** | 15 |",
        "| Zero-shot CLIP | 60.0 | – | none |",
        "",
        "3 seeds.",
    ]


def test_markdown_escapes_what_would_be_markup():
    text = table(("a|b <i> *c* _d_", (0.1,)), columns=(Column("x"),)).to_markdown()
    assert r"a\|b \<i\> \*c\* \_d\_" in text


def best(column, *cells):
    shown = table(*((str(index), (cell,)) for index, cell in enumerate(cells)), columns=(column,)).shown()
    return [row[0].best for row in shown]


def test_which_cells_are_best():
    assert best(ACCURACY, 0.1, 0.3, 0.2) == [False, True, False]
    assert best(FPR, 0.1, 0.3, 0.2) == [True, False, False]
    assert best(SECONDS, 1, 2) == [False, False]
    assert best(ACCURACY, 0.30001, 0.30002, 0.2) == [True, True, False], "what looks equal is marked alike"
    assert best(ACCURACY, math.nan, 0.3, 0.2, None, "90.0") == [False, True, False, False, False]
    assert best(ACCURACY, 0.3, None) == [False, False], "one number is not the best of anything"
    assert best(ACCURACY, 0.30001, 0.30002, None) == [False] * 3, "where all look equal, none is better"


def test_lower_is_better_of_errors_and_false_positives_alone():
    lower = {name for name, column in MEASURES.items() if best(column, 0.1, 0.3)[0]}
    assert lower == {"calibration_error", "fpr95", "fpr95_gallop"}


def test_rows_must_fit_the_columns():
    with pytest.raises(InputError, match="Row 'CoOp' of table 'Results' must have 3 cells, got 1"):
        table(("CoOp", (0.5,)))


def test_a_table_without_rows_is_a_header():
    assert "Accuracy (%)" in table().to_text()
    assert table().shown() == []


def test_the_legend_stands_below_stars_alone():
    assert table(("CoOp", (0.5, 0.4, 1)), ("GalLoP", (0.6, 0.4, 1))).to_text().endswith("\n* best of its column")
    equal = table(("CoOp", (0.5, 0.4, 1)), ("GalLoP", (0.5, 0.4, 2))).to_text()
    assert "*" not in equal and equal.endswith("2")

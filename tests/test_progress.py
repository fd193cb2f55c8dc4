"""Bars belong to terminals; what goes into a file is lines."""

import io
import sys

import pytest

from fastprompt.progress import progress_bar, say_line


class Terminal(io.StringIO):
    def isatty(self):
        return True


def work(shown):
    bar = progress_bar(range(200), what="training", shown=shown, unit="step", mininterval=0)
    say_line("training 200 steps", bar, shown=shown)
    assert list(bar) == list(range(200))


@pytest.mark.parametrize(
    ("stream", "shown", "lines", "bars"),
    [(Terminal, True, 0, True), (Terminal, False, 0, False), (io.StringIO, True, 1, False), (io.StringIO, False, 0, 0)],
)
def test_a_bar_on_a_terminal_and_a_line_elsewhere(monkeypatch, stream, shown, lines, bars):
    monkeypatch.setattr(sys, "stderr", stream())
    work(shown)
    said = sys.stderr.getvalue()
    assert said.count("training 200 steps\n") == lines
    assert ("training: 100%" in said) == bool(bars)
    assert ("\r" in said) == bool(bars)

"""What long work says of itself on standard error: a bar on a terminal or in a notebook, lines in a file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def progress_bar(work: Iterable | None = None, *, what: str, shown: bool, **options: Any) -> tqdm:
    """Show the progress of work as a bar; where standard error is no terminal there is none.

    Args:
        work: what is iterated over; without it, call ``update`` of the bar.
        what: what is done, such as "encoding test images".
        shown: whether to show anything.
        options: as tqdm takes them, such as ``total`` and ``unit``.
    """
    return tqdm(work, desc=what, disable=None if shown else True, **options)


def say_line(text: str, bar: tqdm, *, shown: bool) -> None:
    """Write a line to standard error where progress is to be shown, but the bar is not, as in a log file."""
    if shown and bar.disable:
        print(text, file=sys.stderr, flush=True)

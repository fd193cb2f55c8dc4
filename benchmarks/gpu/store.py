"""Results as they come: lines of JSON that are only ever appended, and one packed file of all.

A folder holds ``rows/STEP.jsonl`` (what its items found), ``logs/STEP.txt`` (what it printed) and ``steps.jsonl`` (how
each step ended).
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

# How a step can end. One that was stopped at its limit or with the command, or was not reached, goes on when the
# command is given again; an item that was at work at the limit counts as failed, for it may be what hangs.
DONE, FAILED, LATE, LEFT_OUT, CUT = "done", "failed", "out of time", "left out", "cut short"
FINAL = (DONE, FAILED, LEFT_OUT)
TESTS = "suite-tests"  # whose rows are outcomes of tests


@dataclass
class Item:
    """What one item found.

    Attributes:
        rows: in the order in which they came.
        error: why it failed; None if it did not.
        finished: False for one that was interrupted, or is at work.
    """

    rows: list[dict] = field(default_factory=list)
    error: str | None = None
    finished: bool = False


def append(file: Path, line: Mapping[str, object]) -> None:
    """Append a line of JSON in one write, on the disk when this returns. A line that a kill tore ends before it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("ab+", buffering=0) as stream:
        torn = stream.tell() > 0 and stream.seek(-1, os.SEEK_END) >= 0 and stream.read(1) != b"\n"
        stream.write(b"\n" * torn + json.dumps(line, default=str).encode() + b"\n")
        os.fsync(stream.fileno())


def lines(file: Path) -> Iterator[dict]:
    """The lines of a file; torn ones are left out, and a file that does not exist has none."""
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            parsed = json.loads(line)
        except json.JSONDecodeError:  # a kill tore it, and its item is done again
            continue
        if isinstance(parsed, dict):
            yield parsed


def rows_file(out: Path, step: str) -> Path:
    """Where the items of a step write."""
    return out / "rows" / f"{step}.jsonl"


def items(out: Path, step: str) -> dict[str, Item]:
    """What the items of a step found so far, in the order in which they were begun."""
    found: dict[str, Item] = {}
    for line in lines(rows_file(out, step)):
        if "again" in line:  # from here on, what failed is tried once more
            bad = [name for name, item in found.items() if item.error is not None or wrong_rows(item)]
            found |= {name: Item() for name in bad}
            continue
        name = line["item"]
        if "started" in line:
            found[name] = Item()
        elif "row" in line:
            found.setdefault(name, Item()).rows.append(line["row"])
        else:
            item = found.setdefault(name, Item())
            item.error, item.finished = line.get("error"), True
    return found


def wrong_rows(item: Item) -> list[dict]:
    """The rows of an item that tell of a wrong result."""
    return [row for row in item.rows if row.get("right") is False or "wrong" in row]


def finished_items(out: Path, step: str) -> set[str]:
    """The items that need not be run."""
    return {name for name, item in items(out, step).items() if item.finished}


def tried_items(out: Path, step: str) -> set[str]:
    """The items that were begun before."""
    return set(items(out, step))


def outcomes(out: Path) -> dict[str, dict]:
    """How each step ended that was run, by its name."""
    return {line["step"]: line for line in lines(out / "steps.jsonl")}


def pack(out: Path, file: Path) -> None:
    """Write all results into one zip file, which replaces the last one as a whole."""
    from fastprompt.files import replacing  # brings torch, which the processes of the steps import when they need it

    wanted = ("*.json", "*.jsonl", "*.md", "*.csv", "rows/*", "logs/*")
    with replacing(file) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(path for pattern in wanted for path in out.glob(pattern) if path.is_file()):
            archive.write(path, path.relative_to(out))

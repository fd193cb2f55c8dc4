"""What was measured, where and with what: rows that are only ever appended, and the table on the screen."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TextIO

import torch

from benchmarks.measure import Benchmark, Measured, Measurement, Shape
from fastprompt.errors import InputError
from fastprompt.evaluation import Row
from fastprompt.report import Column, Table
from fastprompt.training.environment import environment

FOLDER = Path(__file__).parent / "results"
_SETTING = ("date", "device", "threads", "python", "torch", "triton", "fastprompt", "commit")
_NUMBERS = ("median_ms", "p20_ms", "p80_ms", "rounds", "peak_memory_mb", "extra_memory_mb")
_MEASURED = ("implementation", *_NUMBERS, "baseline", "ratio", "over_floor")


def append(file: Path, shape: Shape, device: torch.device, measured: Mapping[str, Measurement]) -> None:
    """Append one row an implementation; the file is made if there is none.

    Raises:
        InputError: the file has other columns; nothing is written then.
    """
    append_rows(file, [{**setting(device), **shape, **_row(*one)} for one in measured.items()])


def setting(device: torch.device) -> dict[str, object]:
    """When, where and with what something is measured: the first columns of every row."""
    known = {**environment(), "device": device_name(device), "commit": _commit()}
    return {name: known[name] for name in _SETTING}


def append_rows(file: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Append rows to a CSV file of the same columns; the file is made if there is none.

    Raises:
        InputError: the file has other columns; nothing is written then.
    """
    new, columns = not file.exists(), list(rows[0])
    if not new and (found := next(csv.reader(file.open()), [])) != columns:
        raise InputError(f"{file} must have the columns {', '.join(columns)}, got {', '.join(found)}")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="") as stream:
        _write_rows(stream, columns, rows, header=new)


def keep_rows(file: Path, kept: Callable[[Mapping[str, str]], bool]) -> list[dict[str, str]]:
    """Drop the rows of a CSV file that are not ``kept``, and return the others, oldest first.

    The file is written anew beside itself and then replaced, so that no row is lost when the process is stopped.

    Raises:
        InputError: there is no such file.
    """
    rows = read_rows(file)
    chosen = [row for row in rows if kept(row)]
    if len(chosen) < len(rows):
        beside = file.with_suffix(".new")
        try:
            with beside.open("w", newline="") as stream:
                _write_rows(stream, list(rows[0]), chosen, header=True)
            beside.replace(file)
        finally:
            beside.unlink(missing_ok=True)
    return chosen


def read_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, oldest first.

    Raises:
        InputError: there is no such file.
    """
    if not file.is_file():
        raise InputError(f"{file} does not exist: run 'python -m benchmarks {file.stem}' first")
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def _write_rows(stream: TextIO, columns: Sequence[str], rows: Sequence[Mapping[str, object]], *, header: bool) -> None:
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)


def _row(name: str, one: Measurement) -> dict[str, object]:
    peak, extra = ("", "") if one.memory is None else (f"{one.memory.beyond_inputs:.1f}", f"{one.memory.extra:.1f}")
    numbers = (f"{one.median:.4f}", f"{one.p20:.4f}", f"{one.p80:.4f}", one.rounds, peak, extra)
    over_floor = "" if one.over_floor is None else f"{one.over_floor:.3f}"
    return dict(zip(_MEASURED, (name, *numbers, one.baseline, f"{one.ratio:.3f}", over_floor), strict=True))


def table(benchmark: Benchmark, shape: Shape, measured: Measured) -> Table:
    """One case, for the screen."""
    columns = (
        Column("median", "ms", ".3f", higher_is_better=False),
        Column("20-80 %", "ms"),
        Column("times faster", format=".2f", higher_is_better=True),
        Column("over the floor", "x", ".2f"),
        Column("peak memory", "MB", ".1f", higher_is_better=False),
        Column("beyond results", "MB", ".1f", higher_is_better=False),
        Column("first call", "s", ".1f"),
    )
    rows = []
    for name, one in measured.measurements.items():
        spread = f"{one.p20:.3f}-{one.p80:.3f}"
        if one.first_call is None:  # a floor, shown in words so that it is never the best of a column
            rows.append(Row(name, (f"{one.median:.3f}", spread, None, one.over_floor, None, None, None)))
            continue
        memory = (None, None) if one.memory is None else (one.memory.beyond_inputs, one.memory.extra)
        rows.append(Row(name, (one.median, spread, one.ratio, one.over_floor, *memory, one.first_call)))
    title = f"{benchmark.title}\n{', '.join(f'{key}={value}' for key, value in shape.items())}"
    note = "\n".join(f"{name} is left out: {why}" for name, why in measured.left_out.items())
    return Table(title, columns, tuple(rows), label_title="implementation", note=note)


def device_name(device: torch.device) -> str:
    """The model of a GPU or a processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit that is measured, with "+changes" behind it if any Python file differs from it."""
    commit = environment()["commit"]
    changed = ["git", "-C", str(FOLDER.parent), "diff", "--quiet", "HEAD", "--", ":/*.py"]
    if commit is not None and subprocess.run(changed, check=False).returncode:
        return f"{commit}+changes"
    return commit

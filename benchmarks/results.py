"""What was measured, where and with what: rows that are only ever appended, and the table on the screen."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.measure import Benchmark, Measurement, Shape
from fastprompt.errors import InputError
from fastprompt.evaluation import Row
from fastprompt.report import Column, Table
from fastprompt.training.environment import environment

FOLDER = Path(__file__).parent / "results"
_SETTING = ("date", "device", "threads", "python", "torch", "triton", "fastprompt", "commit")
_MEASURED = ("implementation", "median_ms", "p20_ms", "p80_ms", "rounds", "peak_memory_mb", "baseline", "ratio")


def append(
    file: Path, benchmark: Benchmark, shape: Shape, device: torch.device, measured: Mapping[str, Measurement]
) -> None:
    """Append one row an implementation; the file is made if there is none.

    Raises:
        InputError: the file has other columns; nothing is written then.
    """
    columns = [*_SETTING, "dtype", *shape, *_MEASURED]
    new = not file.exists()
    if not new and (found := next(csv.reader(file.open()), [])) != columns:
        raise InputError(f"{file} must have the columns {', '.join(columns)}, got {', '.join(found)}")
    file.parent.mkdir(parents=True, exist_ok=True)
    setting = {**environment(), "device": device_name(device), "commit": _commit()}
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore", lineterminator="\n")
        if new:
            writer.writeheader()
        for name, one in measured.items():
            numbers = (f"{one.median:.3f}", f"{one.p20:.3f}", f"{one.p80:.3f}", one.rounds)
            peak = "" if one.peak_memory is None else f"{one.peak_memory:.1f}"
            values = dict(zip(_MEASURED, (name, *numbers, peak, one.baseline, f"{one.ratio:.3f}"), strict=True))
            writer.writerow({**setting, "dtype": benchmark.dtype, **shape, **values})


def table(benchmark: Benchmark, shape: Shape, measured: Mapping[str, Measurement]) -> Table:
    """One case, for the screen."""
    columns = (
        Column("median", "ms", ".1f", higher_is_better=False),
        Column("20-80 %", "ms"),
        Column("times faster", format=".2f", higher_is_better=True),
        Column("peak memory", "MB", ".1f", higher_is_better=False),
    )
    rows = tuple(
        Row(name, (one.median, f"{one.p20:.1f}-{one.p80:.1f}", one.ratio, one.peak_memory))
        for name, one in measured.items()
    )
    title = f"{benchmark.title}\n{', '.join(f'{key}={value}' for key, value in shape.items())}, {benchmark.dtype}"
    return Table(title, columns, rows, label_title="implementation")


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

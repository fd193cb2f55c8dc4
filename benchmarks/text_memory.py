"""What text passes take at the worst moment, where all of them do the whole work.

The padded passes are timed on a part of it, for the whole takes minutes; what they hold is measured here without times.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.measure import Shape
from benchmarks.memory import Memory, peak_memory
from benchmarks.text_encoder import NAMES, OURS, PADDED, TRUNCATED, all_sequences, build
from fastprompt.errors import InputError
from fastprompt.evaluation import Row
from fastprompt.report import Column, Table

WEIGHED = (PADDED, TRUNCATED, OURS)
DTD, CALTECH, LARGEST, _ = NAMES

# On a CPU what fits into 20 GB: the padded pass takes 28 MB a sequence and more, 90 GB for 8 x 397 of them.
SHAPES = {
    "cpu": tuple(all_sequences(names, prompts) for names, prompts in ((DTD, 1), (DTD, 8), (CALTECH, 4), (LARGEST, 1))),
    "cuda": tuple(all_sequences(names, prompts) for names in (DTD, CALTECH, LARGEST) for prompts in (1, 8)),
}


def weigh(shape: Shape, device: torch.device) -> dict[str, Memory]:
    """Peak memory of forward and backward by implementation, each in a fresh process; without those that do not fit.

    Raises:
        InputError: the system does not tell, or the memory of the machine was not enough.
    """
    memory = {}
    for name in WEIGHED:
        memory |= _peak(shape, device, name)
    if None in memory.values():
        raise InputError("peak memory is measured on Linux with glibc, and on CUDA or ROCm devices; this is neither")
    return memory


def _peak(shape: Shape, device: torch.device, name: str) -> dict[str, Memory | None]:
    """Peak memory of one implementation by its name; nothing where a GPU has not enough: 8 x 397 names take 90 GB."""
    try:
        return {name: peak_memory(build, shape, device, name)}
    except torch.OutOfMemoryError:
        print(f"{name} does not fit into the memory of this device: {dict(shape)}")
        return {}


def write(shape: Shape, device: torch.device, memory: Mapping[str, Memory], file: Path) -> None:
    """Append one row an implementation to a CSV file."""
    rows = []
    for name, one in memory.items():
        peak, times = f"{one.beyond_inputs:.1f}", _times_less(memory, name)
        less = "" if times is None else f"{times:.3f}"
        measured = {"implementation": name, "peak_memory_mb": peak, "baseline": PADDED, "times_less": less}
        rows.append({**results.setting(device), **shape, **measured})
    results.append_rows(file, rows)


def table(shape: Shape, memory: Mapping[str, Memory]) -> Table:
    """For the screen."""
    columns = (
        Column("peak memory", "MB", ".1f", higher_is_better=False),
        Column("times less", format=".2f", higher_is_better=True),
    )
    rows = tuple(Row(name, (one.beyond_inputs, _times_less(memory, name))) for name, one in memory.items())
    title = f"Memory of a text pass, {', '.join(f'{key}={value}' for key, value in shape.items())}"
    return Table(title, columns, rows, label_title="implementation")


def _times_less(memory: Mapping[str, Memory], name: str) -> float | None:
    return memory[PADDED].beyond_inputs / memory[name].beyond_inputs if PADDED in memory else None

"""From which size on the similarity kernels beat the best eager code, over a grid of small to large problems."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import fastprompt_kernels as kernels
import numpy as np
import torch
from tqdm import tqdm

from benchmarks import patch_statistics, results, similarity, topk_similarity
from benchmarks.measure import Case, Shape, check, time_interleaved
from fastprompt.evaluation import Row
from fastprompt.report import Column, Table

IMAGES, CLASSES, PATCHES = (1, 4, 16, 64), (10, 47, 100, 400, 1000), (49, 196)
LARGEST = 32 * 196 * 1000  # images x patches x classes: what is larger tells nothing new, and takes long
SECONDS = 0.3  # a cell

EAGER, OURS = "best eager", "fastprompt"


def measure_grid(device: torch.device, folder: Path) -> str:
    """Measure the grid, append its rows to ``break_even.csv`` and write its tables to ``break_even-<device type>.md``.

    Ours is "auto". On a processor it takes `dense` or `blocked` for topk_similarity by two numbers that were chosen so
    that this table is as good as it can be (`FEW_ROWS` and `DENSE_SHARE` of its op.py).

    Raises:
        WrongResultError: a result is wrong.

    Returns:
        The tables.
    """
    rows, setting = [], results.setting(device)
    for op, shape in tqdm(list(_cells(device)), desc="cells", disable=None):
        case = replace(_case(op, shape, device), floors={})
        check(case)
        times = time_interleaved(case, device, SECONDS)
        eager, ours = (float(np.median(times[name])) for name in (EAGER, OURS))
        numbers = {"eager_ms": f"{eager:.4f}", "fastprompt_ms": f"{ours:.4f}", "ratio": f"{eager / ours:.3f}"}
        rows.append({**setting, "op": op, **shape, **numbers})
    results.append_rows(folder / "break_even.csv", rows)
    text = "# Ours beside eager code, by size\n\n" + "\n\n".join(table.to_markdown() for table in tables(rows)) + "\n"
    (folder / f"break_even-{device.type}.md").write_text(text)
    return text


def tables(rows: Sequence[Mapping[str, object]]) -> list[Table]:
    """For each op, pass and number of patches, how many times faster ours is: images down, classes across."""
    found = []
    for op, direction, P in dict.fromkeys((row["op"], row["pass"], row["P"]) for row in rows):
        ratios = {(row["B"], row["C"]): row for row in rows if (row["op"], row["pass"], row["P"]) == (op, direction, P)}
        images, classes = (list(dict.fromkeys(axis)) for axis in zip(*ratios, strict=True))
        cells = [tuple(_cell(ratios.get((B, C))) for C in classes) for B in images]
        found.append(
            Table(
                f"{op}, {direction}, P={P}, {rows[0]['dtype']} on {rows[0]['device']}",
                tuple(Column(f"C={C}") for C in classes),
                tuple(Row(f"B={B}", line) for B, line in zip(images, cells, strict=True)),
                label_title="times faster than the best eager code",
            )
        )
    return found


def _cell(row: Mapping[str, object] | None) -> str | None:
    return None if row is None else f"{float(row['ratio']):.2f}" + (" (eager wins)" if float(row["ratio"]) < 1 else "")


def _cells(device: torch.device) -> Iterator[tuple[str, Shape]]:
    dtype, ops = "bfloat16" if device.type == "cuda" else "float32", ("topk_similarity", "patch_statistics")
    for op, direction, P, B, C in product(ops, similarity.PASSES, PATCHES, IMAGES, CLASSES):
        if B * P * C <= LARGEST:
            N, k = (4, 20) if op == "topk_similarity" else ("", "")  # patch_statistics has neither
            yield op, {"dtype": dtype, "pass": direction, "B": B, "P": P, "N": N, "D": 512, "C": C, "k": k}


def _case(op: str, shape: Shape, device: torch.device) -> Case:
    if op == "topk_similarity":
        chosen = {EAGER: topk_similarity.topk_mean_best, OURS: kernels.topk_similarity}
        return topk_similarity.case(shape, device, chosen)
    _, eager, ours = patch_statistics.computations(shape["pass"])
    return patch_statistics.case(shape, device, {EAGER: eager, OURS: ours})

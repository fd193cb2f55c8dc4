"""The table of all methods: trials that are missing, the cost of steps, and the page that the table stands in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import results
from benchmarks.method_steps import IMAGES, measure_steps
from benchmarks.methods import DESCRIPTIONS, RATE, SETTINGS, Setting, run_trial, write_descriptions
from fastprompt.demo.experiment import SEEDS, SHOTS, prepare
from fastprompt.errors import InputError
from fastprompt.evaluation import Row, Summary, harmonic_mean
from fastprompt.learners import find_method
from fastprompt.report import MEASURES, Column, Table

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
BEGIN, END = "<!-- begin: python -m benchmarks methods -->", "<!-- end: python -m benchmarks methods -->"
COLUMNS = {
    **{name: MEASURES[name] for name in ("base", "new", "harmonic", "fpr95", "auroc")},
    "step": Column("Step", unit="ms", higher_is_better=False),
    "memory": Column("Memory of a step", unit="MB", higher_is_better=False),
}


def measure_all(scenes: Path, folder: Path, page: Path) -> str:
    """Train and test what ``methods.csv`` lacks, measure the steps, and put the table into a page.

    A row is written as soon as its trial is done, and rows of settings that are no longer here are dropped.

    Args:
        scenes: where the scenes and their features are, or are made.
        folder: of ``methods.csv`` and ``method_steps.csv``.
        page: Markdown with the two markers between which the table stands.

    Returns:
        The table as text.
    """
    before, after = around_table(page)
    file, materials = folder / "methods.csv", prepare(scenes)
    write_descriptions(materials.dataset.test.class_names, scenes / DESCRIPTIONS)
    wanted = trials()
    kept = results.keep_rows(file, lambda row: _key(row) in wanted) if file.exists() else []
    known = {_key(row) for row in kept}
    for label, seed, training in tqdm([key for key in wanted if key not in known], desc="trials", disable=None):
        measures = run_trial(SETTINGS[label], int(seed), materials, scenes)
        key = {"label": label, "seed": seed, "training": training}
        results.append_rows(file, [{**results.setting(torch.device("cpu")), **key, **measures}])
    costs = measure_steps(scenes, folder)
    shown = table(results.read_rows(file), costs)
    page.write_text(f"{before}{BEGIN}\n\n{shown.to_markdown()}\n\n{END}{after}", encoding="utf-8")
    return shown.to_text()


def trials() -> list[tuple[str, str, str]]:
    """What there is to do: label, seed and settings, as they stand in a row. Zero-shot has nothing random in it."""
    return [
        (label, str(seed), _training(setting))
        for label, setting in SETTINGS.items()
        for seed in (SEEDS if find_method(setting.method).learns else SEEDS[:1])
    ]


def _key(row: Mapping[str, str]) -> tuple[str, str, str]:
    return row["label"], row["seed"], row["training"]


def _training(setting: Setting) -> str:
    """Everything that decides a trial beside its seed, in one cell."""
    if not find_method(setting.method).learns:
        return ""
    options = json.dumps(dict(setting.options))
    return f"{SHOTS} shots, {setting.epochs} epochs of batches of {setting.batch_size}, {RATE} x lr, {options}"


def table(rows: Sequence[Mapping[str, str]], costs: Mapping[str, tuple[float, float | None]]) -> Table:
    """The rows as means over seeds, with time (ms) and memory (MB) of a step by label."""
    lines = []
    for label in SETTINGS:
        own = [row for row in rows if row["label"] == label]
        base, new, fpr95, auroc = (_summary(own, name) for name in ("base", "new", "fpr95", "auroc"))
        harmonic = None if new is None else harmonic_mean(base.mean, new.mean)
        lines.append(Row(label, (base, new, harmonic, fpr95, auroc, *costs.get(label, (None, None)))))
    note = (
        f"Trained on {SHOTS} images of each of the 32 base classes, {len(SEEDS)} seeds. H is the harmonic mean of the "
        "two means. FPR95 and AUROC: test images of the base classes against objects of no class, by GL-MCM. A step is "
        f"forward and backward for {IMAGES} images on cached features; memory is beyond what was there."
    )
    return Table("All methods on the demo's scenes", tuple(COLUMNS.values()), tuple(lines), "Method", note)


def _summary(rows: Sequence[Mapping[str, str]], measure: str) -> Summary | None:
    values = [float(row[measure]) for row in rows if row[measure] != ""]
    return Summary.of(values) if values else None


def around_table(page: Path) -> tuple[str, str]:
    """What stands before and behind the table of a page.

    Raises:
        InputError: there is no such page, or it does not have both markers once.
    """
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise InputError(f"{page} must have the line {BEGIN!r} once, and {END!r} behind it")
    before, rest = text.split(BEGIN)
    return before, rest.split(END)[1]

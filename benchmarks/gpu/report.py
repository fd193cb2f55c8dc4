"""One page from what is there: what was measured beside what the model said, and what to change.

It is drawn from any part of the results, after each run or by ``--report``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from benchmarks.gpu import store
from benchmarks.gpu.found import Found
from benchmarks.gpu.model import lines
from benchmarks.gpu.plan import STEPS
from fastprompt.errors import InputError
from fastprompt.evaluation import Row
from fastprompt.files import write_file
from fastprompt.report import Column, Table

FASTER = 0.97  # of the present row's time: what is nearer to it is noise
KERNELS = 15  # of a profile that are shown
LONGEST = 300  # characters of what went wrong
REHEARSAL = (
    "**A rehearsal: a CPU, Triton's interpreter and tiny shapes.** It shows that every step runs. Its times say "
    "nothing of a GPU, and none of them stands beside the model."
)


def write(out: Path) -> Path:
    """Write ``report.md`` and, where a GPU made the rows of the sweep, ``launch_table.csv``; returns the page's path.

    Raises:
        InputError: the folder has no results, or cannot be written.
    """
    if not (out / "rows").is_dir():
        raise InputError(f"--out: expected a folder with results of 'python -m benchmarks gpu', got {out}")
    found = Found(out)
    winners = list(_winners(found))
    if winners and not found.rehearsed:
        write_file(out / "launch_table.csv", _csv(winners))
    page = out / "report.md"
    write_file(page, "\n\n".join(_page(found, winners)) + "\n")
    return page


def _page(found: Found, winners: list[dict]) -> Iterator[str]:
    yield "# What a GPU says"
    if found.rehearsed:
        yield REHEARSAL
    yield _machine(found)
    yield _steps(found).to_markdown()
    yield "## Wrong or failed"
    yield "\n".join(_wrong(found)) or "Nothing so far."
    yield "## Model and measurement"
    yield _model(found).to_markdown()
    yield "## Times"
    for title, step in (("Similarity", "headline"), ("Text tower", "text"), ("GalLoP step", "train"),
                        ("Call overhead, tiny tensors", "overhead")):  # fmt: skip
        if rows := [row for row in found.rows(step) if "implementation" in row or ("replays" in row and "ms" in row)]:
            yield _times(title, rows).to_markdown()
    if winners:
        yield "## Launch tables"
        yield _launches(winners).to_markdown()
    yield from _profile(found)
    if rows := [row for row in found.rows("tail") if "ratio" in row]:
        yield "## The long tail"
        yield _tail(rows).to_markdown()


def _machine(found: Found) -> str:
    """Facts, one to a line."""
    facts: dict[str, object] = {}
    for row in found.rows("environment", "facts"):
        facts |= row
    packages = facts.pop("packages", {})
    facts["packages"] = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
    facts["missing packages"] = ", ".join(name for name, version in packages.items() if not version) or "none"
    facts["tools"] = ", ".join(name for name, path in (facts.get("tools") or {}).items() if path) or "none"
    return "\n".join(f"* {name}: {_one_line(value)}" for name, value in facts.items())


def _one_line(value: object) -> str:
    return " ".join(str(value).split())


def _steps(found: Found) -> Table:
    columns = tuple(Column(title, unit, ".0f") for title, unit in (
        ("ended", ""), ("took", "s"), ("items", ""), ("failed", ""), ("wrong results", "")))  # fmt: skip
    ended, rows = store.outcomes(found.out), []
    for step in STEPS:
        one, items = ended.get(step.name, {}), store.items(found.out, step.name)
        status = one.get("status", "interrupted" if items else "not run")
        errors = sum(item.error is not None for item in items.values())
        wrong = sum(len(store.wrong_rows(item)) for item in items.values())
        rows.append(Row(f"{step.name}: {step.title}", (status, one.get("seconds"), len(items), errors, wrong)))
    return Table("Steps", columns, tuple(rows), label_title="step")


def _wrong(found: Found) -> Iterator[str]:
    for step in STEPS:
        for name, item in store.items(found.out, step.name).items():
            if item.error is not None:
                yield f"* {step.name}, {name}: {_one_line(item.error)[-LONGEST:]}"
            for row in store.wrong_rows(item):
                said = row.get("wrong") or ", ".join(f"{key} {value}" for key, value in row.items())
                yield f"* {step.name}, {name}: wrong: {_one_line(said)[:LONGEST]}"
        if step.name == "suite":  # also of one that was stopped before its end
            for line in store.lines(store.rows_file(found.out, store.TESTS)):
                if line["outcome"] == "failed":
                    yield f"* suite, {line['test']}: {_one_line(line['said'])[-LONGEST:]}"
        ended = store.outcomes(found.out).get(step.name, {})
        itself = ended.get("status") == store.FAILED and not ended["errors"] + ended["wrong"]
        if itself or ended.get("status") in (store.LATE, store.LEFT_OUT):
            yield f"* {step.name}: {ended['status']}: {_one_line(ended['tail'])[-LONGEST:]}"


def _model(found: Found) -> Table:
    columns = (
        Column("unit"), Column("model"), Column("with this machine's ceilings"), Column("measured", format=".3g"),
        Column("measured over model", format=".2f"), Column("what it says"),
    )  # fmt: skip
    rows = []
    for line in lines(found):
        here = None if line.here is None else _range(*line.here)
        rows.append(
            Row(line.what, (line.unit, _range(line.low, line.high), here, line.measured, line.ratio, line.says))
        )
    note = (
        "Times: from what is possible if products and selection overlap to one after the other; the ratio is to the "
        "latter, with this machine's ceilings where they were measured. Headline shape: B = 128, P = 196, N = 4, "
        "C = 1000, D = 512, k = 5, 10, 15 and 20, bfloat16."
    )
    return Table("docs/kernels.md, line by line", columns, tuple(rows), label_title="line", note=note)


def _range(low: float, high: float) -> str:
    return f"{low:.3g}" if high <= 1.01 * low else f"{low:.3g} to {high:.3g}"


def _times(title: str, rows: list[dict]) -> Table:
    columns = (
        Column("device", "ms", ".4f"), Column("20-80 %", "ms"), Column("as called", "ms", ".4f"),
        Column("over the first", "x", ".2f"), Column("how, or why not"),
    )  # fmt: skip
    shown, first = [], {}
    for row in rows:
        named = [str(row[key]) for key in ("name", "dtype", "pass") if key in row]
        kind = " ".join(named + [f"{key}={row[key]}" for key in ("B", "G", "C") if key in row])
        ms, wall = row.get("ms"), row.get("wall_ms")
        base = first.setdefault(kind, ms)
        how = row.get("left_out") or row.get("wrong") or row.get("timed")
        how += f"; not captured: {row['not_captured']}" if "not_captured" in row else ""
        spread = None if ms is None else f"{row['p20_ms']:.4f}-{row['p80_ms']:.4f}"
        label = row.get("implementation") or f"with{'' if row['replays'] else 'out'} replays"
        ratio = None if ms is None or base is None else ms / base
        shown.append(Row(f"{kind} {label}".strip(), (ms, spread, wall, ratio, _one_line(how)[:LONGEST])))
    return Table(title, columns, tuple(shown), label_title="implementation")


def _winners(found: Found) -> Iterator[dict]:
    """The fastest row of each launch table beside the present one."""
    parts: dict[tuple, list[dict]] = {}
    for row in found.rows("sweep"):
        parts.setdefault((row["kernel"], row["k"], row["keep"]), []).append(row)
    for rows in parts.values():
        best, usual = min(rows, key=lambda row: row["ms"]), next(row for row in rows if row["usual"])
        best = best if best["ms"] < FASTER * usual["ms"] else usual
        named = {key: best[key] for key in ("kernel", "target", "dtype", "patches", "k", "keep", "blocks", "ms")}
        yield {**named, "present_blocks": usual["blocks"], "present_ms": usual["ms"], "tried": len(rows),
               "ratio": round(best["ms"] / usual["ms"], 3)}  # fmt: skip


def _csv(rows: list[dict]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _launches(winners: list[dict]) -> Table:
    columns = (Column("present", "ms", ".4f"), Column("fastest", "ms", ".4f"), Column("of the present", format=".2f"),
               Column("tried", format=".0f"), Column("fastest row"))  # fmt: skip
    rows = []
    for one in winners:
        label = f"{one['kernel']}, k={one['k']}{', with bits' * one['keep']}"
        same = one["blocks"] == one["present_blocks"]
        cells = (one["present_ms"], one["ms"], one["ratio"], one["tried"], "the present one" if same else one["blocks"])
        rows.append(Row(label, cells))
    note = f"Ready to commit: launch_table.csv. A row counts as faster below {FASTER:.0%} of the present one's time."
    return Table("Fastest rows at the headline shape", columns, tuple(rows), label_title="kernel", note=note)


def _profile(found: Found) -> Iterator[str]:
    columns = (Column("a step", "ms", ".3f"), Column("share", "%", ".1f", 100.0), Column("launches", format=".0f"))
    for features in dict.fromkeys(row["features"] for row in found.rows("profile", "kernels")):
        every, *kernels = found.rows("profile", "kernels", features=features)
        rows = [Row(row["kernel"], (row["ms"], row["ms"] / every["ms"], row["launches"])) for row in kernels[:KERNELS]]
        title = f"Kernels of a step, {features}: {every['ms']:.2f} ms in {every['launches']:.0f} launches"
        note = f"A step took {every['wall_ms']:.2f} ms by the host's clock, with the profiler on."
        yield Table(title, columns, tuple(rows), label_title="kernel", note=note).to_markdown()
    parts = [row for row in found.rows("profile", "parts") if row["features"]]
    if parts:
        rows = tuple(Row(f"{row['features']}: {row['part']}", (row["ms"],)) for row in parts)
        yield Table("Parts of a step", columns[:1], rows, label_title="part").to_markdown()


def _tail(rows: list[dict]) -> Table:
    columns = (
        Column("median", "ms", ".3f"),
        Column("times faster", format=".2f"),
        Column("over the floor", "x", ".2f"),
    )
    said = ("name", "dtype", "pass", "method", "layer", "B", "P", "N", "C", "G", "k")
    shown = [
        Row(
            f"{' '.join(f'{row[key]}' if key in said[:5] else f'{key}={row[key]}' for key in said if key in row)}: "
            f"{row['implementation']}",
            (row["median"], row["ratio"], row["over_floor"]),
        )
        for row in rows
    ]
    return Table("Benchmarks at their shapes for a GPU", columns, tuple(shown), label_title="implementation")

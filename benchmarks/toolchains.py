"""Try the project with every supported pair of torch and Triton: ``make matrix``.

Each pair gets an environment of its own below ``.matrix``, about 6 GB large, which is removed when the pair is done.
Every step is a process with a time limit; what it found is written when it ends, and a second call goes on with what is
left. This file needs nothing but Python.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
REST = ("tests/backbone", "tests/data", "tests/exchange", "tests/layers", "tests/learners", "tests/training")


@dataclass(frozen=True)
class Pair:
    """What is installed together.

    Attributes:
        torch: version; empty for the newest. It brings the Triton that fits it.
        python: minor version, looked for as python3.X.
        lowest: whether everything else is as old as pyproject.toml allows.
    """

    torch: str
    python: str
    lowest: bool = False

    @property
    def name(self) -> str:
        """Such as torch-2.11.0-lowest."""
        return f"torch-{self.torch or 'newest'}" + ("-lowest" if self.lowest else "")


PAIRS = (
    Pair("2.11.0", "3.10", lowest=True),
    Pair("2.11.0", "3.12"),
    Pair("2.12.1", "3.13"),
    Pair("2.13.0", "3.10"),
    Pair("2.14.1", "3.11"),
    Pair("", "3.13"),
)
VERSIONS = (
    "import json, platform, numpy, torch, triton; "
    "print(json.dumps([torch.__version__, triton.__version__, platform.python_version(), numpy.__version__]))"
)


def install(pair: Pair, folder: Path) -> list[list[str]]:
    """The commands that make the environment of a pair."""
    python, own = str(folder / "bin" / "python"), str(shutil.which(f"python{pair.python}"))
    make = [[own, "-m", "venv", str(folder)], [python, "-m", "pip", "install", "--quiet", "--upgrade", "pip>=25.1"]]
    wanted = [f"torch=={pair.torch}"] if pair.torch else []
    if not pair.lowest:
        return [*make, [python, "-m", "pip", "install", "--quiet", *wanted, "--editable", ".", "--group", "dev"]]
    uv = [str(folder / "bin" / "uv"), "pip", "install", "--quiet", "--python", python, "--resolution", "lowest-direct"]
    return [
        *make,
        [python, "-m", "pip", "install", "--quiet", "uv"],
        [*uv, *wanted, "--editable", ".", "--group", "dev"],
    ]


def steps(pair: Pair, folder: Path) -> dict[str, tuple[list[list[str]], int]]:
    """Commands and seconds of each step, in order."""
    python = str(folder / "bin" / "python")
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "--tb=short"]
    without = "--ignore=tests/kernels/test_kernel_resources.py"
    return {
        "install": (install(pair, folder), 3600),
        "versions": ([[python, "-c", VERSIONS]], 300),
        "resources": ([[python, "-m", "benchmarks.toolchain_survey"]], 1800),
        "kernels": ([[*tests, "tests/kernels", without]], 2400),
        "rest": ([[*tests, *(["tests"] if pair.lowest else REST), "--ignore=tests/kernels"]], 2400),
    }


def run(commands: list[list[str]], limit: int) -> dict[str, object]:
    """What a step printed, and how it ended."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    ended = None
    for command in commands:
        try:
            ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"status": "stopped", "output": f"stopped after {limit} seconds"}
        except OSError as error:
            return {"status": "failed", "output": str(error)}
        if ended.returncode:
            break
    output = ended.stdout if ended.returncode == 0 else ended.stderr + ended.stdout  # pytest counts in its last line
    return {"status": "done" if ended.returncode == 0 else "failed", "output": output[-200_000:]}


def try_pair(pair: Pair, work: Path, keep: bool) -> dict[str, dict]:
    """What every step of a pair found, by its name; what is on the disk already is not done again."""
    kept, folder = work / f"{pair.name}.json", work / pair.name
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    if shutil.which(f"python{pair.python}") is None:
        return {"install": {"status": "failed", "output": f"there is no python{pair.python} here"}}
    missing = {step for step in steps(pair, folder) if found.get(step, {}).get("status") != "done"}
    if missing and not folder.is_dir():
        missing.add("install")  # the environment went when the pair was done, and a step of it had failed
    for step, (commands, limit) in steps(pair, folder).items():
        if step not in missing:
            continue
        print(f"{pair.name}: {step}", flush=True)
        found[step] = run(commands, limit)
        temporary = kept.with_suffix(".unfinished")
        temporary.write_text(json.dumps(found))
        temporary.replace(kept)
        print(f"{pair.name}: {step} {found[step]['status']}: {summary(found[step])}", flush=True)
        if step in ("install", "versions") and found[step]["status"] != "done":
            return found
    if not keep:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def summary(step: dict | None) -> str:
    """The last line of what a step printed, without its seconds."""
    if step is None:
        return "not run"
    lines = [line for line in str(step["output"]).splitlines() if line.strip()] or [""]
    return re.sub(r" in [\d.]+s.*| \(\d:\d\d:\d\d\)", "", lines[-1]).strip("= ")[:160]


def compiled_rows(pair: Pair, found: dict[str, dict]) -> list[dict[str, object]]:
    """A row for every kernel that was compiled: pair, versions, kernel, target, and what came of it."""
    if found.get("resources", {}).get("status") != "done":
        return []
    torch, triton, python, numpy = json.loads(found["versions"]["output"])
    versions = {"pair": pair.name, "torch": torch, "triton": triton, "python": python, "numpy": numpy}
    return [{**versions, **json.loads(line)} for line in found["resources"]["output"].splitlines()]


def cell(rows: Sequence[dict]) -> str:
    """What one kernel came to on one target: its variants, registers and spills, or why it was refused."""
    refused = [str(row["refused"]) for row in rows if row["refused"]]
    if refused:
        return f"{len(refused)} of {len(rows)} refused: {refused[0]}"
    spilled = sum(row["spilled"] for row in rows)
    return f"{max(row['registers'] for row in rows)}" + (f", **{spilled} bytes spilled**" if spilled else "")


def table(found: dict[Pair, dict[str, dict]]) -> str:
    """The page: what passed with each pair, and what each kernel needs."""
    lines = [
        "# Toolchains",
        "",
        "Made by `make matrix`, without a GPU: tests run in Triton's interpreter, kernels are compiled ahead of time.",
        "",
        "| torch | Triton | Python | NumPy | other packages | tests of kernels | other tests |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for pair, of_pair in found.items():
        versions = of_pair.get("versions", {})
        known = (
            json.loads(versions["output"]) if versions.get("status") == "done" else [pair.torch, "?", pair.python, "?"]
        )
        others = "as old as allowed" if pair.lowest else "current"
        failed = next((of_pair[step] for step in ("install", "versions") if of_pair[step]["status"] != "done"), None)
        tested = [summary(failed or of_pair.get(step)) for step in ("kernels", "rest")]
        lines.append("| " + " | ".join([*known, others, *tested]) + " |")
    lines += [
        "",
        "Registers of a thread, the most of the variants compiled; no variant spills where nothing is said.",
        "",
    ]
    lines += ["| Triton | kernel | " + " | ".join(TARGETS) + " |", "| --- | --- |" + " ---: |" * len(TARGETS)]
    by_version = {rows[0]["triton"]: rows for pair, one in found.items() if (rows := compiled_rows(pair, one))}
    for rows in by_version.values():
        for kernel in sorted({str(row["kernel"]) for row in rows}):
            cells = [[row for row in rows if (row["kernel"], row["target"]) == (kernel, target)] for target in TARGETS]
            known = [cell(chosen) if chosen else "–" for chosen in cells]
            lines.append(f"| {rows[0]['triton']} | `{kernel}` | " + " | ".join(known) + " |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Try the pairs and write the tables; returns 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.toolchains", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"some of {', '.join(pair.name for pair in PAIRS)}")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    parser.add_argument("--again", action="store_true", help="forget what an earlier call found")
    asked = parser.parse_args()
    work = ROOT / ".matrix"
    work.mkdir(exist_ok=True)
    if unknown := set(asked.only or ()) - {pair.name for pair in PAIRS}:
        parser.error(f"--only: expected names of pairs, got {min(unknown)}")
    chosen = [pair for pair in PAIRS if not asked.only or pair.name in asked.only]
    if asked.again:
        for pair in chosen:
            (work / f"{pair.name}.json").unlink(missing_ok=True)
    for pair in chosen:
        try_pair(pair, work, asked.keep)
    known = {pair: json.loads(file.read_text()) for pair in PAIRS if (file := work / f"{pair.name}.json").is_file()}
    (RESULTS / "toolchains.md").write_text(table(known))
    rows = [row for pair, found in known.items() for row in compiled_rows(pair, found)]
    if rows:
        with (RESULTS / "toolchains.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print(f"{RESULTS / 'toolchains.md'}")
    return int(any(step["status"] != "done" for found in known.values() for step in found.values()))


if __name__ == "__main__":
    sys.exit(main())

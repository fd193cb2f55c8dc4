"""compute-sanitizer on every operator: memory out of bounds, races, memory that nobody wrote, barriers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from benchmarks.gpu.cases import Rows
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.processes import end_with_parent, tail

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 9  # exit status where the tool finds something
SECONDS = 60


def items(plan: Plan) -> dict[str, Rows]:
    """One item for each kind of check."""
    return {tool: partial(_check, plan, tool) for tool in TOOLS[: 1 if plan.quick or plan.rehearse else None]}


def _check(plan: Plan, tool: str) -> Iterator[dict]:
    """Where compute-sanitizer is not there, and in a rehearsal, the program runs without it."""
    command = [sys.executable, "-m", "benchmarks.gpu.smallest", plan.device]
    sanitizer = None if plan.rehearse else shutil.which("compute-sanitizer")
    if sanitizer is not None:
        # With torch's cache of memory, what lies behind a tensor would belong to it.
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND), *command]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    log = plan.out / "logs" / f"sanitizer-{tool}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    # No pipe: what the tool started would hold it open after the tool was stopped at its limit, and be waited for.
    with log.open("wb") as stream:
        done = subprocess.run(
            command, env=environment, stdout=stream, stderr=subprocess.STDOUT, timeout=SECONDS, check=False,
            preexec_fn=end_with_parent,
        )  # fmt: skip
    yield {
        "tool": tool,
        "checked": sanitizer is not None,
        "status": done.returncode,
        "right": done.returncode == 0,
        "tail": tail(log)[-1500:] if done.returncode else "",
    }

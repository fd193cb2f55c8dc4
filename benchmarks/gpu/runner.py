"""Step after step, each in processes of its own with a time limit; nothing that is done is lost or done again."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu import processes, store
from benchmarks.gpu.plan import Plan, Step
from benchmarks.gpu.processes import ROOT

LEAST = 5.0  # seconds without which a step is not begun

Say = Callable[[str], None]


def run_steps(
    steps: Sequence[Step],
    plan: Plan,
    pack: Path,
    *,
    seconds: float,
    again: bool = False,
    site: Path | None = None,
    package: str = "benchmarks.gpu",
    say: Say = print,
) -> None:
    """Run what is not done yet, and pack the results after each step.

    Args:
        steps: in their order.
        plan: how they are run.
        pack: file of the packed results.
        seconds: for all of them together. Where they are more than the limits of the steps add up to, the limits grow
            with them, and the last step may take all that is left; what does not fit is left for the next call.
        again: run steps that failed, too; of these, what failed or is missing.
        site: folder with more packages.
        package: of the modules of the steps.
        say: is told what happens.
    """
    end = time.monotonic() + seconds
    before = {name: outcome["status"] for name, outcome in store.outcomes(plan.out).items()}
    ended = (store.DONE,) if again else store.FINAL
    waiting = [step for step in steps if before.get(step.name) not in ended]
    for step in steps:
        last = before.get(step.name)
        if step not in waiting:
            say(f"{step.name}: {last} before")
            continue
        if end - time.monotonic() < LEAST:
            say(f"{step.name}: no time is left; give the command again to go on")
            continue
        if again and last is not None:
            store.append(store.rows_file(plan.out, step.name), {"again": True})
        say(f"{step.name}: {step.title}")
        limit = step.seconds * max(1.0, seconds / sum(one.seconds for one in waiting))
        deadline = end if step is waiting[-1] else min(time.monotonic() + limit, end)
        status = store.CUT if deadline == end else store.LATE
        outcome = _run(step, plan, deadline, status, site, f"{package}.{step.name}")
        store.append(plan.out / "steps.jsonl", outcome)
        counts = ", ".join(f"{outcome[name]} {name}" for name in ("items", "errors", "wrong"))
        say(f"  {outcome['status']} after {outcome['seconds']} s: {counts}")
        store.pack(plan.out, pack)


def _run(step: Step, plan: Plan, deadline: float, stopped: str, site: Path | None, module: str) -> dict[str, object]:
    """Run one step to its end, or until it is ``stopped`` at the deadline; returns how it ended."""
    begin = time.monotonic()
    if missing := [name for name in step.needs if find_spec(name) is None]:
        return _outcome(step, plan, begin, store.LEFT_OUT, f"{', '.join(missing)} cannot be imported here")
    status = store.DONE
    while True:
        before = store.finished_items(plan.out, step.name)
        exits = _workers(step, plan, deadline, site, module)
        if exits is None:
            status = stopped
            if status == store.LATE:
                _write_down(step, plan, "the step was out of time")
            break
        if not any(exits):
            break
        _write_down(step, plan, f"its process ended with status {max(exits, key=abs)}")
        if store.finished_items(plan.out, step.name) == before:  # not even one item: the step itself fails
            status = store.FAILED
            break
    found = store.items(plan.out, step.name).values()
    if status == store.DONE and any(item.error or store.wrong_rows(item) for item in found):
        status = store.FAILED
    log = _log(plan, step)
    return _outcome(step, plan, begin, status, "" if status == store.DONE else processes.tail(log))


def _workers(step: Step, plan: Plan, deadline: float, site: Path | None, module: str) -> list[int] | None:
    """Start the workers of a step and wait; their exit statuses, or None if they had to be stopped."""
    workers = min(step.workers, os.cpu_count() or 1)
    flags = [name for name in ("rehearse", "quick") if getattr(plan, name)]
    arguments = [module, step.name, str(plan.out)]
    started = [
        processes.start(
            [sys.executable, "-m", "benchmarks.gpu.work", *arguments, str(worker), str(workers), *flags],
            _log(plan, step),
            environment(plan, site),
        )
        for worker in range(workers)
    ]
    try:
        return [process.wait(max(0.0, deadline - time.monotonic())) for process in started]
    except subprocess.TimeoutExpired:
        return None
    finally:
        for process in started:
            processes.kill(process)


def _write_down(step: Step, plan: Plan, why: str) -> None:
    """Items at which a process ended without a word count as failed, so that the next process goes on behind them."""
    file = store.rows_file(plan.out, step.name)
    for name, item in store.items(plan.out, step.name).items():
        if not item.finished:
            said = processes.tail(_log(plan, step), 5)
            store.append(file, {"item": name, "error": f"{why}: {said}"})


def environment(plan: Plan, site: Path | None) -> dict[str, str]:
    """The environment of a step: the checkout and more packages on the path; a rehearsal sees no GPU."""
    own = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    own.pop("TRITON_INTERPRET", None)
    paths = [ROOT, ROOT / "kernels", *([site] if site else []), *filter(None, [own.get("PYTHONPATH")])]
    own["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    if plan.rehearse:
        own |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return own


def _log(plan: Plan, step: Step) -> Path:
    return plan.out / "logs" / f"{step.name}.txt"


def _outcome(step: Step, plan: Plan, begin: float, status: str, tail: str) -> dict[str, object]:
    found = store.items(plan.out, step.name)
    return {
        "step": step.name,
        "status": status,
        "seconds": round(time.monotonic() - begin, 1),
        "items": len(found),
        "errors": sum(item.error is not None for item in found.values()),
        "wrong": sum(len(store.wrong_rows(item)) for item in found.values()),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "tail": tail,
    }

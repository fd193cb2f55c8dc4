"""Where a training step goes: its parts, and the kernels that it launches."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import step_profile, train_step
from benchmarks.gpu import train
from benchmarks.gpu.cases import Rows
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.small import use_small_models

STEPS = 3
LARGEST = 40  # kernels that have a row; the others share one
SECONDS = 3.0  # of each kind of features


def items(plan: Plan) -> dict[str, Rows]:
    """Kernels of both kinds of steps, then parts."""
    use_small_models(plan)
    found: dict[str, Rows] = {
        f"kernels: {name}": partial(_kernels, plan, name) for name in (train_step.IMAGES, train_step.CACHED)
    }
    if plan.quick:
        return dict(list(found.items())[:1])
    return found | {"parts": partial(_parts, plan)}


def _kernels(plan: Plan, name: str) -> Iterator[dict]:
    """Milliseconds and launches of every kernel in one step, the longest first; on a processor of every operator."""
    device = torch.device(plan.device)
    step = train_step.build(train.shape(plan), device).implementations[name]
    for _ in range(5):  # recordings are made in the third
        step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    _wait(device)
    begin = time.perf_counter()
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step()
        _wait(device)
    wall = 1e3 * (time.perf_counter() - begin) / STEPS
    rows = []
    for event in profiler.key_averages():
        on_device = str(event.device_type).endswith("CUDA")
        if device.type == "cuda" and (not on_device or event.key.startswith("Optimizer.")):  # of its kernels, once more
            continue
        micros = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        rows.append({"kernel": event.key[:200], "ms": micros / 1e3 / STEPS, "launches": event.count / STEPS})
    rows.sort(key=lambda row: -row["ms"])
    ms, launches = (sum(row[key] for row in rows) for key in ("ms", "launches"))
    yield {"features": name, "kernel": "all", "ms": ms, "launches": launches, "wall_ms": wall}
    for row in rows[:LARGEST]:
        yield {"features": name, **row}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _parts(plan: Plan) -> Iterator[dict]:
    if not plan.rehearse:
        step_profile.SECONDS = SECONDS
    for one in step_profile.profile(train.shape(plan), torch.device(plan.device)):
        for part, ms in {**one.parts, "step": one.step}.items():
            yield {"features": one.features, "part": part, "ms": ms}

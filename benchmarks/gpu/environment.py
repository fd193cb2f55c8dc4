"""What the machine is, and how fast its parts are: the numbers that the models of docs/kernels.md assume."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from importlib import metadata

import torch
from fastprompt_kernels import available_implementations

from benchmarks.gpu import triton_ceilings
from benchmarks.gpu.cases import Rows
from benchmarks.gpu.clock import time_calls
from benchmarks.gpu.command import PACKAGES, source
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.processes import ROOT

TOOLS = ("nvidia-smi", "compute-sanitizer", "ncu", "nvcc", "cuobjdump", "gcc", "g++")
PROPERTIES = ("name", "major", "minor", "total_memory", "multi_processor_count", "L2_cache_size",
              "shared_memory_per_block_optin", "regs_per_multiprocessor", "warp_size", "clock_rate")  # fmt: skip


def items(plan: Plan) -> dict[str, Rows]:
    """Facts, and one item for each ceiling."""
    size, words, rounds = (256, 2**16, 64) if plan.rehearse else (8192, 2**30, 4096)
    found: dict[str, Rows] = {"facts": partial(_facts, plan), "copy": partial(_copy, plan, words)}
    for dtype in ("bfloat16",) if plan.quick else ("bfloat16", "float16", "float32"):
        found[f"product {dtype}"] = partial(_product, plan, (size,) * 3, dtype)
    if not plan.quick:
        for m, k, n in ((4000, 512, 25088), (25088, 4000, 512), (4000, 25088, 512)):  # of topk_similarity, B = 128
            found[f"product {m} {k} {n}"] = partial(
                _product, plan, (8, 16, 8) if plan.rehearse else (m, k, n), "bfloat16"
            )
    found["second-level cache"] = partial(_second_level, plan, 2**12 if plan.rehearse else 2**22)
    found["minima"] = partial(_minima, plan, rounds)
    return found


def _facts(plan: Plan) -> Iterator[dict]:
    packages = {name: _version(name) for name in ("torch", "triton", *PACKAGES.values())}
    tools = {name: shutil.which(name) for name in TOOLS}
    yield {
        "source": source(), "commit": _said("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "python": platform.python_version(), "platform": platform.platform(), "cores": os.cpu_count(),
        "cuda": torch.version.cuda, "hip": torch.version.hip, "packages": packages, "tools": tools,
        "available": available_implementations(plan.device),
    }  # fmt: skip
    if plan.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        yield {name: getattr(properties, name) for name in PROPERTIES if hasattr(properties, name)}
        query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,memory.used"
        yield {"nvidia-smi": _said("nvidia-smi", f"--query-gpu={query}", "--format=csv")}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _said(*command: str) -> str | None:
    """What a command prints, None where it is not there, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _copy(plan: Plan, size: int) -> Iterator[dict]:
    source, target = (torch.ones(size, dtype=torch.uint8, device=plan.device) for _ in range(2))
    times = time_calls([lambda: target.copy_(source)], torch.device(plan.device), plan.seconds)
    yield {"bytes": 2 * size, **times, "TB/s": 2 * size / times["ms"] / 1e9}


def _product(plan: Plan, shape: tuple[int, int, int], dtype: str) -> Iterator[dict]:
    """A product of random matrices: on zeros it can be faster."""
    (m, k, n), kind = shape, getattr(torch, dtype)
    pairs = [
        (torch.randn(m, k, device=plan.device).to(kind), torch.randn(k, n, device=plan.device).to(kind))
        for _ in range(2)
    ]
    runs = [partial(torch.mm, *pair) for pair in pairs]
    for run in runs:
        run()
    times = time_calls(runs, torch.device(plan.device), plan.seconds)
    yield {"m": m, "k": k, "n": n, "dtype": dtype, **times, "TFLOP/s": 2 * m * k * n / times["ms"] / 1e9}


def _second_level(plan: Plan, words: int) -> Iterator[dict]:
    """All programs read the same 16 MB again and again, around the first-level caches."""
    run, read = triton_ceilings.reading(words, torch.device(plan.device), few=plan.rehearse)
    times = time_calls([run], torch.device(plan.device), plan.seconds)
    yield {"bytes": read, **times, "TB/s": read / times["ms"] / 1e9}


def _minima(plan: Plan, rounds: int) -> Iterator[dict]:
    """How many minima and maxima of float32 there are in a second, without any memory."""
    run, made = triton_ceilings.comparing(rounds, torch.device(plan.device), few=plan.rehearse)
    times = time_calls([run], torch.device(plan.device), plan.seconds)
    yield {"minima": made, **times, "1e12/s": made / times["ms"] / 1e9}

"""Several implementations of one computation beside each other: checked first, then timed, then weighed.

Absolute times say little across machines, so all implementations run interleaved in one process (A B C A B C ...) and
what counts is their ratio. Peak memory is measured in a fresh process for each.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import platform
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

Shape = Mapping[str, int | str]
Implementation = Callable[[], tuple[Tensor, ...]]

MIN_ROUNDS, MAX_ROUNDS = 3, 50
SECONDS = 60.0  # what the rounds of one case may take together, once there are MIN_ROUNDS of them
QUICK_SECONDS = 10.0


class WrongResultError(Exception):
    """An implementation computes something else than the baseline, so its time means nothing."""


@dataclass(frozen=True)
class Case:
    """One workload on one device.

    Attributes:
        implementations: by name; each runs forward and backward on the same inputs and returns outputs and gradients.
        baseline: the one whose results are the truth of the check, and whose time is the unit of the ratios.
        tolerance: largest relative error ``norm(x - truth) / norm(truth)`` of any output or gradient.
    """

    implementations: Mapping[str, Implementation]
    baseline: str
    tolerance: float


@dataclass(frozen=True)
class Benchmark:
    """A family of cases.

    Attributes:
        name: of the command and of the file of results.
        title: what is measured.
        dtype: precision of the inputs.
        build: makes a case from one shape; a function of a module, because other processes call it too.
        shapes: the shapes measured; all have the same parameters, and C, the number of classes, is one of them.
        quick_shapes: those of a quick run.
        panels: parameters that stay equal within one drawing of the growth in C.
    """

    name: str
    title: str
    dtype: str
    build: Callable[[Shape, torch.device], Case]
    shapes: tuple[Shape, ...]
    quick_shapes: tuple[Shape, ...]
    panels: tuple[str, ...]


@dataclass(frozen=True)
class Measurement:
    """What one implementation did.

    Attributes:
        median, p20, p80: milliseconds of forward and backward.
        rounds: how often it was timed.
        peak_memory: MB (1e6 bytes) in use at the worst moment beyond the inputs; None where the system does not tell.
        baseline: the implementation whose time is the unit of the ratio.
        ratio: median time of the baseline over its own: how many times faster it is.
    """

    median: float
    p20: float
    p80: float
    rounds: int
    peak_memory: float | None
    baseline: str
    ratio: float


def measure(benchmark: Benchmark, shape: Shape, device: torch.device, quick: bool = False) -> dict[str, Measurement]:
    """Check, time and weigh every implementation of one case.

    Raises:
        WrongResultError: a result is wrong; nothing has been timed then.
    """
    case = benchmark.build(shape, device)
    round_seconds = check(case, device)
    rounds = int((QUICK_SECONDS if quick else SECONDS) / round_seconds)
    times = time_interleaved(case, device, min(max(rounds, MIN_ROUNDS), MAX_ROUNDS))
    median = {name: float(np.median(values)) for name, values in times.items()}
    measurements = {}
    for name, values in tqdm(times.items(), desc="peak memory", leave=False, disable=None):
        p20, p80 = np.percentile(values, [20, 80])
        peak = peak_memory(benchmark.build, shape, device, name)
        measurements[name] = Measurement(
            median[name], float(p20), float(p80), len(values), peak, case.baseline, median[case.baseline] / median[name]
        )
    return measurements


def check(case: Case, device: torch.device) -> float:
    """Compare the results of all implementations with those of the baseline; this warms them up too.

    Returns:
        Seconds that one round of all implementations took.

    Raises:
        WrongResultError: names the implementation, its error and the tolerance.
    """
    start = time.perf_counter()
    truth = [tensor.double() for tensor in case.implementations[case.baseline]()]
    for name in tqdm(case.implementations, desc="check", leave=False, disable=None):
        if name == case.baseline:
            continue
        result = case.implementations[name]()
        for index, (got, expected) in enumerate(zip(result, truth, strict=True)):
            if got.shape != expected.shape:
                raise WrongResultError(f"{name}: result {index} has shape {got.shape}, expected {expected.shape}")
            error = ((got.double() - expected).norm() / expected.norm()).item()
            if not error <= case.tolerance:  # NaN is refused too
                raise WrongResultError(
                    f"{name}: result {index} is {error:.1e} (relative) away from that of {case.baseline}; "
                    f"at most {case.tolerance:.0e} is rounding"
                )
    _synchronize(device)
    return time.perf_counter() - start


def time_interleaved(case: Case, device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every implementation in every round; they take turns, so that a busy moment hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in case.implementations}
    for _ in tqdm(range(rounds), desc="rounds", leave=False, disable=None):
        for name, implementation in case.implementations.items():
            _synchronize(device)
            start = time.perf_counter()
            implementation()
            _synchronize(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def peak_memory(
    build: Callable[[Shape, torch.device], Case], shape: Shape, device: torch.device, implementation: str
) -> float | None:
    """Peak MB beyond the inputs of one implementation, measured in a fresh process; None where it cannot be told."""
    if device.type != "cuda" and platform.libc_ver()[0] != "glibc":
        return None
    _release_free_memory()  # the other process may need it
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_memory_here, build, shape, device, implementation).result() / 1e6


def _peak_memory_here(
    build: Callable[[Shape, torch.device], Case], shape: Shape, device: torch.device, name: str
) -> int:
    """Bytes, in this process. A first run loads code and fills caches, which are not the implementation's own."""
    run = build(shape, device).implementations[name]
    run()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    _release_free_memory()  # or it would hide what is taken again
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew from what is resident now
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _release_free_memory() -> None:
    """Give memory that this process keeps but does not use back to the system, where its C library can."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    """Bytes of a field of /proc/self/status, such as VmRSS (resident now) or VmHWM (its highest mark)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

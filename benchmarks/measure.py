"""Several implementations of one computation beside each other: checked first, then timed, then weighed.

Absolute times say little across machines, so all implementations run interleaved in one process (A B C A B C ...) and
what counts is their ratio. Peak memory is measured in a fresh process for each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.memory import Memory, peak_memory

Shape = Mapping[str, int | str]
Implementation = Callable[[], tuple[Tensor, ...]]

MIN_ROUNDS, MAX_ROUNDS = 3, 50
SECONDS = 12.0  # what the rounds of one case may take together, once there are MIN_ROUNDS of them
QUICK_SECONDS = 8.0


class WrongResultError(Exception):
    """An implementation computes something else than it should, so its time means nothing."""


class UnavailableError(Exception):
    """An implementation cannot run here; the message says why, and what would help."""


@dataclass(frozen=True)
class AsRounded:
    """A tolerance for low precision, in which nobody can say beforehand how far rounding carries.

    Another implementation in the same precision says it: no result may be more than ``FACTOR`` times as far from the
    truth as its own. That it computes the right thing is seen in float32, where the tolerance is a number. An error
    that one rounding of bfloat16 can make is never too large: a single number, like a loss, can be right by chance.

    Attributes:
        by: name of that implementation.
    """

    by: str
    FACTOR: ClassVar[float] = 2.0
    ONE_ROUNDING: ClassVar[float] = torch.finfo(torch.bfloat16).eps


@dataclass(frozen=True)
class Case:
    """One workload on one device.

    Attributes:
        implementations: by name; each computes the same from the same inputs and returns results and gradients.
            Its first call may compile, or raise UnavailableError: it is left out then.
        baseline: the one whose time is the unit of the ratios.
        truth: computes what the results must be; it is not timed.
        tolerance: largest relative error ``norm(x - truth) / norm(truth)`` of any result, or who says how large.
        floors: by name, the least work that such a computation must do; timed with the others, never checked.
        calls: calls that are timed together, for what takes microseconds.
        units: by name, how much one call computes (images, say) where implementations differ in that; 1 by default.
            Times are those of one unit, memory is that of a whole call.
        shares: by name, n for an implementation that does an n-th of the work only, because the whole would take
            minutes: its time is multiplied by n. It is not weighed, for the memory of a part says little.
        truth_of_shares: what the results of those must be, where that is not the truth of all.
    """

    implementations: Mapping[str, Implementation]
    baseline: str
    truth: Implementation
    tolerance: float | AsRounded
    floors: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    calls: int = 1
    units: Mapping[str, int] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)
    truth_of_shares: Implementation | None = None


Build = Callable[[Shape, torch.device], Case]


@dataclass(frozen=True)
class Benchmark:
    """A family of cases.

    Attributes:
        name: of the command and of the file of results.
        title: what is measured.
        build: makes a case from one shape; a function of a module, because other processes call it too.
        shapes: for each kind of device the shapes measured; all have the same parameters, "dtype" the first of them.
        quick_shapes: those of a quick run.
        implementations: the names of those that a case may have, of which some cases lack some.
        sweeps: parameters whose growth is drawn: those that vary alone around a middle shape.
        labels: parameters that only name what another one says.
    """

    name: str
    title: str
    build: Build
    shapes: Mapping[str, tuple[Shape, ...]]
    quick_shapes: Mapping[str, tuple[Shape, ...]]
    implementations: tuple[str, ...]
    sweeps: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """What one implementation did.

    Attributes:
        median, p20, p80: milliseconds of one unit, which is one call unless the case says otherwise.
        rounds: how often it was timed.
        memory: at the worst moment; None where the system does not tell, for floors, and for a share of the work.
        baseline: the implementation whose time is the unit of the ratio.
        ratio: median time of the baseline over its own: how many times faster it is.
        over_floor: its own median time over that of the slowest floor; None where there is no floor.
        first_call: seconds of the first call, which compiles what is compiled; None for floors.
    """

    median: float
    p20: float
    p80: float
    rounds: int
    memory: Memory | None
    baseline: str
    ratio: float
    over_floor: float | None
    first_call: float | None


@dataclass(frozen=True)
class Measured:
    """One case: measurements by implementation, floors last, and why which implementations were left out."""

    measurements: Mapping[str, Measurement]
    left_out: Mapping[str, str]


def measure(benchmark: Benchmark, shape: Shape, device: torch.device, quick: bool = False) -> Measured:
    """Check, time and weigh every implementation of one case.

    Raises:
        WrongResultError: a result is wrong; nothing has been timed then.
    """
    case = benchmark.build(shape, device)
    first_calls, left_out = check(case)
    case = replace(case, implementations={name: case.implementations[name] for name in first_calls})
    times = time_interleaved(case, device, QUICK_SECONDS if quick else SECONDS)
    median = {name: float(np.median(values)) for name, values in times.items()}
    floor = max((median[name] for name in case.floors), default=None)
    measurements, unweighed = {}, {*case.floors, *case.shares}
    for name, values in tqdm(times.items(), desc="peak memory", leave=False, disable=None):
        p20, p80 = np.percentile(values, [20, 80])
        measurements[name] = Measurement(
            median[name],
            float(p20),
            float(p80),
            len(values),
            None if name in unweighed else peak_memory(benchmark.build, shape, device, name),
            case.baseline,
            median[case.baseline] / median[name],
            None if floor is None else median[name] / floor,
            first_calls.get(name),
        )
    return Measured(measurements, left_out)


def check(case: Case) -> tuple[dict[str, float], dict[str, str]]:
    """Compare the results of all implementations with the truth; this warms them up too.

    Returns:
        By name the seconds of the first call, and why which implementations cannot run here.

    Raises:
        WrongResultError: names the implementation, its error and the tolerance; or a result of the truth that is zero
            everywhere, so that no relative error can be told.
    """
    truth = _in_double(case.truth)
    of_shares = truth if case.truth_of_shares is None else _in_double(case.truth_of_shares)
    first_calls, left_out, errors = {}, {}, {}
    for name, implementation in tqdm(case.implementations.items(), desc="check", leave=False, disable=None):
        start = time.perf_counter()
        try:
            results = implementation()
        except UnavailableError as error:
            left_out[name] = str(error)
            continue
        errors[name] = _errors(name, results, of_shares if name in case.shares else truth)  # waits for the device
        first_calls[name] = time.perf_counter() - start
    _judge(errors, case.tolerance)
    return first_calls, left_out


def _in_double(implementation: Implementation) -> list[Tensor]:
    """The truth, by whose norm errors are divided."""
    truth = [tensor.double() for tensor in implementation()]
    for index, expected in enumerate(truth):
        if not expected.norm() > 0:
            raise WrongResultError(f"the truth: result {index} must have a norm above 0, got {expected.norm():.1e}")
    return truth


def _errors(name: str, results: tuple[Tensor, ...], truth: list[Tensor]) -> list[float]:
    """The relative error of each result."""
    errors = []
    for index, (got, expected) in enumerate(zip(results, truth, strict=True)):
        if got.shape != expected.shape:
            raise WrongResultError(f"{name}: result {index} has shape {got.shape}, expected {expected.shape}")
        errors.append(((got.double() - expected).norm() / expected.norm()).item())
    return errors


def _judge(errors: Mapping[str, Sequence[float]], tolerance: float | AsRounded) -> None:
    for name, of_results in errors.items():
        for index, error in enumerate(of_results):
            largest = tolerance
            if isinstance(tolerance, AsRounded):
                largest = max(tolerance.FACTOR * errors[tolerance.by][index], tolerance.ONE_ROUNDING)
            if not error <= largest:  # NaN is refused too
                raise WrongResultError(
                    f"{name}: result {index} is {error:.1e} (relative) away from the truth; "
                    f"at most {largest:.0e} is rounding"
                )


def time_interleaved(case: Case, device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Milliseconds a unit of every implementation and floor in every round, for MIN_ROUNDS and about so many seconds.

    They take turns, so that a busy moment hits all alike.
    """
    all_of_them = {**case.implementations, **case.floors}
    times: dict[str, list[float]] = {name: [] for name in all_of_them}
    end = time.perf_counter() + seconds
    for done in tqdm(range(MAX_ROUNDS), desc="rounds", leave=False, disable=None):
        if done >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for name, run in all_of_them.items():
            scale = case.shares.get(name, 1) / case.units.get(name, 1)
            times[name].append(scale * _milliseconds(run, device, case.calls))
    return times


def _milliseconds(run: Callable[[], object], device: torch.device, calls: int) -> float:
    """Time of one call, by the device's own clock where it has one."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / calls
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    return 1e3 * (time.perf_counter() - begin) / calls

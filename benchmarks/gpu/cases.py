"""One implementation of a case at a time, checked and timed: where one is wrong or does not fit, the others go on."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial

import torch

from benchmarks.gpu.clock import time_calls
from benchmarks.gpu.plan import Plan
from benchmarks.measure import AsRounded, Build, Case, Shape, UnavailableError, WrongResultError, check

Rows = Callable[[], Iterator[dict]]


@dataclass(frozen=True)
class Timed:
    """What is timed beside each other.

    Attributes:
        name: of the computation.
        build: makes a case from a shape; a function of a module.
        shape: of the inputs.
        names: implementations and floors, in their order.
        copies: how many sets of the same inputs take turns, so that the second-level cache does not hold them.
        graphs: whether a CUDA graph may hold the calls.
    """

    name: str
    build: Build
    shape: Shape
    names: tuple[str, ...]
    copies: int = 1
    graphs: bool = True

    def items(self, plan: Plan) -> dict[str, Rows]:
        """An item for each name."""
        said = " ".join(f"{key}={value}" for key, value in self.shape.items())
        return {f"{self.name} {said}: {name}": partial(self.rows, plan, name) for name in self.names}

    def rows(self, plan: Plan, name: str) -> Iterator[dict]:
        """One row: times, or why there are none."""
        device = torch.device(plan.device)
        row = {"name": self.name, **self.shape, "implementation": name}
        try:
            cases = _cases(self.build, tuple(self.shape.items()), device, self.copies)
            times = partial(time_calls, device=device, seconds=plan.seconds, graphs=self.graphs)
            yield row | _measured(cases, name, times)
        except torch.OutOfMemoryError:
            gc.collect()
            torch.cuda.empty_cache()
            yield row | {"left_out": "it does not fit into the memory of this device"}


@lru_cache(maxsize=1)
def _cases(build: Build, shape: tuple[tuple[str, int | str], ...], device: torch.device, copies: int) -> list[Case]:
    """The cases of the shape at work, whose truth is computed once."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return [replace(case, truth=cache(case.truth)) for case in (build(dict(shape), device) for _ in range(copies))]


def _measured(cases: list[Case], name: str, timed: Callable[[list], dict[str, object]]) -> dict[str, object]:
    first = cases[0]
    if name in first.floors:
        return timed([case.floors[name] for case in cases])
    if name not in first.implementations:
        return {"left_out": "not measured with this shape"}
    wanted = {name, first.tolerance.by} if isinstance(first.tolerance, AsRounded) else {name}
    begin = time.perf_counter()
    try:
        check(replace(first, implementations={one: first.implementations[one] for one in wanted}))
        times = timed([case.implementations[name] for case in cases])
    except WrongResultError as error:
        return {"wrong": str(error)}
    except UnavailableError as error:
        return {"left_out": str(error)}
    share = first.shares.get(name, 1) / first.units.get(name, 1)
    scaled = {key: share * value if key.endswith("ms") else value for key, value in times.items()}
    return scaled | {"counted": share, "check_s": round(time.perf_counter() - begin, 2)}

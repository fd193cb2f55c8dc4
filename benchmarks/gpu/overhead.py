"""What a call costs before any arithmetic: tiny tensors, by the host's clock and as graph replays."""

from __future__ import annotations

from benchmarks import call_overhead
from benchmarks.gpu.cases import Rows, Timed
from benchmarks.gpu.plan import Plan


def items(plan: Plan) -> dict[str, Rows]:
    """Both passes."""
    names = [name for name in call_overhead.FUNCTIONS if name != call_overhead.ON_CPU]
    found: dict[str, Rows] = {}
    for shape in call_overhead.BENCHMARK.shapes["cuda"][: 1 if plan.quick else None]:
        found |= Timed("call_overhead", call_overhead.build, shape, tuple(names[::-1])).items(plan)
    return found

"""The long tail: every benchmark at every shape that it has for a GPU, checked, timed and weighed as always."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

import torch

from benchmarks import call_overhead, conditional, drop_in, patch_statistics, text_encoder, topk_similarity, train_step
from benchmarks.gpu.cases import Rows
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.small import use_small_models
from benchmarks.measure import Benchmark, Shape, measure

BENCHMARKS = (topk_similarity, patch_statistics, text_encoder, train_step, conditional, drop_in)


def items(plan: Plan) -> dict[str, Rows]:
    """One item for each shape, a benchmark after the other; with compiled peers and memory."""
    use_small_models(plan)
    if plan.rehearse:
        shapes = [(call_overhead.BENCHMARK, call_overhead.BENCHMARK.shapes["cpu"][0])]
    else:
        benchmarks = [module.BENCHMARK for module in BENCHMARKS]
        shapes = [
            (one, shape) for one in benchmarks for shape in (one.quick_shapes if plan.quick else one.shapes)["cuda"]
        ]
    return {f"{one.name} {dict(shape)}": partial(_measure, plan, one, shape) for one, shape in shapes}


def _measure(plan: Plan, benchmark: Benchmark, shape: Shape) -> Iterator[dict]:
    measured = measure(benchmark, shape, torch.device(plan.device), quick=True)
    for name, one in measured.measurements.items():
        yield {"name": benchmark.name, **shape, "implementation": name, **asdict(one)}
    for name, why in measured.left_out.items():
        yield {"name": benchmark.name, **shape, "implementation": name, "left_out": why}

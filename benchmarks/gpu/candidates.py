"""Other rows of launch tables: which of them compile, and compute the same. Compiled here, they need not be later."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from itertools import zip_longest

import torch

from benchmarks.gpu import launches
from benchmarks.gpu.cases import Rows
from benchmarks.gpu.launches import Blocks, Part
from benchmarks.gpu.plan import Plan

IMAGES = 2  # enough to compile and to compare


def items(plan: Plan) -> dict[str, Rows]:
    """The first candidate of all kernels, then the second of all, and so on."""
    each = [[(part, change) for change in launches.changes(plan, part)] for part in launches.parts(plan)]
    return {
        f"{part}: {launches.said(change)}": partial(_compare, plan, part, change)
        for line in zip_longest(*each)
        for part, change in filter(None, line)
    }


def _compare(plan: Plan, part: Part, change: Blocks) -> Iterator[dict]:
    run, device = part.prepare(plan, IMAGES), torch.device(plan.device)
    blocks = part.changed(device, 20 if plan.rehearse else 196, change)
    begin = time.perf_counter()
    results = run(blocks)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    usual = run(part.usual(device, 20 if plan.rehearse else 196))
    floats = [(a.double(), b.double()) for a, b in zip(results, usual, strict=True) if a.is_floating_point()]
    error = max(((a - b).norm() / b.norm()).item() for a, b in floats)
    # Sums of another order differ by rounding, and where it decides so does what is selected: a few words of many.
    words = [(a != b).double().mean().item() for a, b in zip(results, usual, strict=True) if not a.is_floating_point()]
    differ = max((one for one in words if one == one), default=0.0)
    right = error <= torch.finfo(torch.bfloat16).eps and differ <= 1e-2
    yield {"part": str(part), "blocks": launches.said(blocks), "change": dict(change), "error": error,
           "words_that_differ": differ, "right": right, "compile_s": round(seconds, 2)}  # fmt: skip

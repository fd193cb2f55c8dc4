"""Launch tables: the times of those rows that compile and compute the same, beside the present row."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from fastprompt_kernels.triton_launch import architecture

from benchmarks.gpu import launches, store
from benchmarks.gpu.cases import Rows
from benchmarks.gpu.clock import time_calls
from benchmarks.gpu.launches import Part
from benchmarks.gpu.plan import Plan

COPIES = 3  # sets of inputs that take turns


def items(plan: Plan) -> dict[str, Rows]:
    """One item for each row of a table."""
    return {str(part): partial(_times, plan, part) for part in launches.parts(plan)}


def _times(plan: Plan, part: Part) -> Iterator[dict]:
    device, P, images = torch.device(plan.device), *((20, 2) if plan.rehearse else (196, 128))
    runs = [part.prepare(plan, images) for _ in range(1 if plan.rehearse else COPIES)]
    usual = part.usual(device, P)
    found = [
        row["change"]
        for item in store.items(plan.out, "candidates").values()
        for row in item.rows
        if row["part"] == str(part) and row["right"]
    ]
    for change in ({}, *found):
        blocks = part.changed(device, P, change)
        calls = [partial(run, blocks) for run in runs]
        for call in calls:
            call()
        times = time_calls(calls, device, plan.seconds / 2)
        yield {
            "kernel": part.kernel, "target": architecture(device), "dtype": "bf16", "patches": P, "k": part.k,
            "keep": part.keep, "blocks": launches.said(blocks), "usual": blocks == usual, **times,
        }  # fmt: skip

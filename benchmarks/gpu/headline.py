"""The similarity kernels at their headline shape: 128 images, 196 patches, 4 prompts, 1000 classes, D = 512."""

from __future__ import annotations

from functools import partial

import torch
from fastprompt_kernels import topk_similarity as ours
from torch import Tensor

from benchmarks import patch_statistics, similarity, topk_similarity
from benchmarks.gpu.cases import Rows, Timed
from benchmarks.gpu.plan import Plan
from benchmarks.measure import Case, Shape
from transcriptions.gallop import topk_mean_dense

FLOORS = ("floor: products", "floor: copy")
COPIES = 4  # 30 MB of inputs each: together twice the second-level cache of an H200


def items(plan: Plan) -> dict[str, Rows]:
    """16 bits first, then float32, where the dense product may be faster."""
    found: dict[str, Rows] = {}
    copies = 2 if plan.rehearse else COPIES
    for shape in _shapes(plan, {"N": 4, "k": 20}):
        found |= Timed("topk_similarity", _similarity, shape, ("fastprompt", *FLOORS, *PEERS), copies).items(plan)
    for shape in _shapes(plan, {}):
        names = ("fastprompt", *FLOORS, "best eager")
        found |= Timed("patch_statistics", _statistics, shape, names, copies).items(plan)
    return found


def _shapes(plan: Plan, more: Shape) -> list[dict[str, int | str]]:
    """Both passes in each precision; a quick run has the first alone."""
    shape = {"dtype": "bfloat16", "pass": "", "B": 128, "P": 196, "D": 512, "C": 1000, **more}
    if plan.rehearse:
        shape |= {"B": 2, "P": 20, "D": 16, "C": 5}
    shapes = [
        {**shape, "dtype": dtype, "pass": direction}
        for dtype in ("bfloat16", "float32")
        for direction in similarity.PASSES
    ]
    return shapes[:1] if plan.quick else shapes[:2] if "k" not in more else shapes


def _best(patches: Tensor, prompts: Tensor, k: tuple[int, ...]) -> Tensor:
    return topk_similarity.topk_mean_best(patches, prompts, k)


PEERS = {"dense": partial(ours, impl="dense"), "best eager": _best, "GalLoP eager": topk_mean_dense}


def _similarity(shape: Shape, device: torch.device) -> Case:
    return topk_similarity.case(
        shape, device, {"GalLoP eager": topk_mean_dense, "fastprompt": partial(ours, impl="triton"), **PEERS}
    )


def _statistics(shape: Shape, device: torch.device) -> Case:
    dense, best, ours = patch_statistics.computations(shape["pass"])
    return patch_statistics.case(
        shape, device, {"dense eager": dense, "best eager": best, "fastprompt": partial(ours, impl="triton")}
    )

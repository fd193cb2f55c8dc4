"""A training step of GalLoP with 128 images and 1000 names, from images and from cached features, beside peers."""

from __future__ import annotations

from benchmarks import text_encoder, train_step
from benchmarks.gpu.cases import Rows, Timed
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.small import FEW, use_small_models

NAMES = (train_step.IMAGES, train_step.CACHED, train_step.TRUNCATED, train_step.CLEAN, train_step.PUBLISHED)


def shape(plan: Plan) -> dict[str, int | str]:
    """Of the step; a fourth of it for the peers."""
    names, images = (FEW, 4) if plan.rehearse else (train_step.LARGEST, 128)
    return {"dtype": "bfloat16", "B": images, "C": len(text_encoder.NAMES[names]), "names": names, "share": 4}


def items(plan: Plan) -> dict[str, Rows]:
    """Ours first. Steps replay graphs of their own and move an optimizer, so no graph is made of them."""
    use_small_models(plan)
    names = NAMES[: 1 if plan.quick else None]
    return Timed("train_step", train_step.build, shape(plan), names, graphs=False).items(plan)

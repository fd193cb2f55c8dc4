"""Rehearsals have the small model that comes with the package in the place of ViT-B/16."""

from __future__ import annotations

from benchmarks import step_profile, text_encoder, train_step
from benchmarks.class_names import DTD
from benchmarks.gpu.plan import Plan

FEW = "DTD"


def use_small_models(plan: Plan) -> None:
    """In a rehearsal: the small model, and nine class names."""
    if plan.rehearse:
        text_encoder.MODEL = train_step.MODEL = "demo"
        text_encoder.NAMES[FEW] = DTD[:9]
        step_profile.SECONDS, step_profile.STORED, step_profile.PICTURE = 0.1, 4, (40, 50)

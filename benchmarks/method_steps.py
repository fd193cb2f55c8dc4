"""What a training step of each method costs on the demo's features."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import results
from benchmarks.measure import Case, Shape, time_interleaved
from benchmarks.memory import Memory, peak_memory
from benchmarks.methods import SETTINGS, make, training_source
from fastprompt.demo.experiment import halves, prepare

if TYPE_CHECKING:
    from fastprompt.backbone import ImageFeatures
    from fastprompt.learners import Learner

IMAGES = 32
SECONDS = 25.0  # for all rounds of all methods together
CPU = torch.device("cpu")


def measure_steps(scenes: Path, folder: Path) -> dict[str, tuple[float, float | None]]:
    """Time the steps in turn, weigh each in a fresh process, and append the rows to ``method_steps.csv``.

    Returns:
        By label the median time (ms) and the peak memory (MB) beyond what was there, None where the system does not
        tell.
    """
    shape = {"dtype": "float32", "B": IMAGES, "scenes": str(scenes)}
    case = build(shape, CPU)
    for step in case.implementations.values():
        step()  # warm-up; there is nothing to compare, for each method computes its own
    costs, rows = {}, []
    times = time_interleaved(case, CPU, SECONDS)
    for label, values in tqdm(times.items(), desc="peak memory", disable=None):
        memory = peak_memory(build, shape, CPU, label)
        median = float(np.median(values))
        costs[label] = median, None if memory is None else memory.beyond_inputs
        rows.append({**results.setting(CPU), "label": label, "B": IMAGES, **_numbers(values, memory)})
    results.append_rows(folder / "method_steps.csv", rows)
    return costs


def _numbers(values: list[float], memory: Memory | None) -> dict[str, object]:
    p20, median, p80 = np.percentile(values, [20, 50, 80])
    peak = "" if memory is None else f"{memory.beyond_inputs:.1f}"
    return {
        "median_ms": f"{median:.2f}",
        "p20_ms": f"{p20:.2f}",
        "p80_ms": f"{p80:.2f}",
        "rounds": len(values),
        "peak_memory_mb": peak,
    }


def build(shape: Shape, device: torch.device) -> Case:
    """A step of every method that learns, on the same images of the base classes.

    Args:
        shape: "B" images, and the folder "scenes" of the trials.
        device: where it runs; the demo's features are on the CPU.
    """
    scenes = Path(shape["scenes"])
    materials = prepare(scenes)
    names = halves(materials.dataset)[0].class_names
    source = training_source(1, materials, scenes)
    chosen = torch.arange(shape["B"]) * (len(source) // shape["B"])  # evenly spaced, so of all classes
    features, labels = source.batch(chosen).to(device), source.labels[chosen]
    steps = {}
    for label, setting in SETTINGS.items():
        torch.manual_seed(0)
        learner = make(setting, materials, names, scenes)
        if learner.learns:
            learner.prepare(source)
            steps[label] = partial(_step, learner, features, labels)
    first = next(iter(steps))
    return Case(steps, baseline=first, truth=steps[first], tolerance=0.0)


def _step(learner: Learner, features: ImageFeatures, labels: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients of the learned tensors."""
    learner.zero_grad()
    loss = learner.backward(learner(features), labels)
    return loss, *(parameter.grad for parameter in learner.parameters())

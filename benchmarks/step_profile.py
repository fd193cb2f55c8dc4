"""Where the time of our own training step goes: the parts of a step beside the step as a whole."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from benchmarks import results
from benchmarks.measure import Shape
from benchmarks.train_step import SGD, Workload, workload
from fastprompt.backbone import ImageFeatures
from fastprompt.report.style import INK, PALETTE, new_figure, style_axes
from fastprompt.training import CachedSource

IMAGES, CACHED = "images", "cached features"
PARTS = ("data", "image tower", "text forward", "similarity", "loss", "similarity backward", "text backward", "optimizer")
WARM_UP, MIN_ROUNDS, MAX_ROUNDS, SECONDS = 2, 5, 50, 8.0
STORED, SOURCES = 256, (300, 400)  # images that a batch is taken from; height and width of a photograph


@dataclass
class Clock:
    """Times of the parts of one step, by the device's own clock where it has one. A part ends where it is marked."""

    device: torch.device
    marks: list[tuple[str, float | torch.cuda.Event]] = field(default_factory=list)

    def mark(self, part: str) -> None:
        """Everything since the last mark was this part."""
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((part, now))

    def milliseconds(self) -> dict[str, float]:
        """By part; what comes before the first mark is no part."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        parts: dict[str, float] = {}
        for (_, start), (part, end) in zip(self.marks, self.marks[1:], strict=False):
            took = start.elapsed_time(end) if self.device.type == "cuda" else 1e3 * (end - start)
            parts[part] = parts.get(part, 0.0) + took
        return parts

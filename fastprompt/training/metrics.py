"""What training reports of itself."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

CLEAR_REFS = Path("/proc/self/clear_refs")  # Linux


@dataclass(frozen=True)
class EpochMetrics:
    """What one epoch of training did.

    Attributes:
        epoch: Counted from 1.
        loss: Mean over the steps of the batch loss, each before its update.
        accuracy: Fraction of the trained images that were predicted right, each before its update.
        lr: Learning rate of this epoch.
        seconds: Wall-clock time of its steps.
        images_per_second: Trained images over these seconds.
        peak_memory_bytes: See `peak_memory`.
    """

    epoch: int
    loss: float
    accuracy: float
    lr: float
    seconds: float
    images_per_second: float
    peak_memory_bytes: int | None

    def line(self, epochs: int) -> str:
        """Say the metrics in one line, as of so many epochs."""
        shown = f"loss {self.loss:.4f}, accuracy {self.accuracy:.4f}, lr {self.lr:.3g}, {self.seconds:.1f} s"
        return f"epoch {self.epoch} of {epochs}: {shown}"


@dataclass(frozen=True)
class TrainingResult:
    """A finished training.

    Attributes:
        epochs: One entry an epoch, from the first, also of those that were trained before a resume.
    """

    epochs: tuple[EpochMetrics, ...]

    @property
    def seconds(self) -> float:
        """Wall-clock time of all steps."""
        return sum(epoch.seconds for epoch in self.epochs)


def peak_memory(device: torch.device) -> int | None:
    """Most bytes in use so far.

    On CUDA what torch allocated, elsewhere the resident set of the whole process; since `reset_peak_memory` on CUDA and
    on Linux, since the process started elsewhere. None on Windows, which does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB


def reset_peak_memory(device: torch.device) -> None:
    """Start to measure anew, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access(CLEAR_REFS, os.W_OK):
        CLEAR_REFS.write_text("5")  # resets the high-water mark that getrusage reads

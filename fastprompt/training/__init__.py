"""Training: settings, the loop, and the run folder that it writes."""

from fastprompt.training.interrupt import Interrupted
from fastprompt.training.loop import fit
from fastprompt.training.metrics import EpochMetrics, TrainingResult
from fastprompt.training.run_folder import RunFolder, epoch_metrics
from fastprompt.training.settings import TrainingSettings, published_settings

__all__ = [
    "EpochMetrics",
    "Interrupted",
    "RunFolder",
    "TrainingResult",
    "TrainingSettings",
    "epoch_metrics",
    "fit",
    "published_settings",
]

"""Training: settings, sources of batches, the loop, and the run folder that it writes."""

from fastprompt.training.given import as_source
from fastprompt.training.interrupt import Interrupted
from fastprompt.training.loop import fit
from fastprompt.training.metrics import EpochMetrics, TrainingResult
from fastprompt.training.run_folder import RunFolder, epoch_metrics
from fastprompt.training.settings import TrainingSettings, published_settings
from fastprompt.training.sources import CachedSource, FeatureSource, ImageSource, ViewSource

__all__ = [
    "CachedSource",
    "EpochMetrics",
    "FeatureSource",
    "ImageSource",
    "Interrupted",
    "RunFolder",
    "TrainingResult",
    "TrainingSettings",
    "ViewSource",
    "as_source",
    "epoch_metrics",
    "fit",
    "published_settings",
]

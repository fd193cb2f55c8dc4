"""Labelled images as features: what the frozen image tower says, and where a learner reads it from."""

from fastprompt.sources.features import PATCHES, POOLED, ImageFeatures, Reads
from fastprompt.sources.given import Images, as_source
from fastprompt.sources.source import CachedSource, FeatureSource, ImageSource, ReadImages, ViewSource

__all__ = [
    "PATCHES",
    "POOLED",
    "CachedSource",
    "FeatureSource",
    "ImageFeatures",
    "ImageSource",
    "Images",
    "ReadImages",
    "Reads",
    "ViewSource",
    "as_source",
]

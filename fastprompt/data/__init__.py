"""Images, labels and tensors: datasets, few-shot samplers, transforms and the on-disk feature cache.

This room knows nothing of backbones or learners: whoever turns images into features hands in a function.
"""

from fastprompt.data.feature_cache import CachedFeatures, FeatureCache, default_cache_dir
from fastprompt.data.few_shot import few_shot, select_classes
from fastprompt.data.images import Dataset, LabelledImages
from fastprompt.data.load import load_dataset
from fastprompt.data.reading import find_images, load_image, read_batch
from fastprompt.data.transforms import ImageTransform

__all__ = [
    "CachedFeatures",
    "Dataset",
    "FeatureCache",
    "ImageTransform",
    "LabelledImages",
    "default_cache_dir",
    "few_shot",
    "find_images",
    "load_dataset",
    "load_image",
    "read_batch",
    "select_classes",
]

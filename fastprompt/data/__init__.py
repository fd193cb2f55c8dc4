"""Images, labels and tensors: datasets, few-shot samplers, transforms and the on-disk feature cache.

This room knows nothing of backbones or learners: whoever turns images into features hands in a function.
"""

from fastprompt.data.decoded import DecodedImages, decode_images, decoded_bytes
from fastprompt.data.feature_cache import CachedFeatures, FeatureCache, default_cache_dir, hash_files
from fastprompt.data.few_shot import few_shot, select_classes
from fastprompt.data.images import Dataset, LabelledImages, readable_name
from fastprompt.data.load import load_dataset
from fastprompt.data.random_crops import RandomCrops, draw_crops, seeded_crops
from fastprompt.data.reading import find_images, load_image, read_batch
from fastprompt.data.transforms import ImageTransform

__all__ = [
    "CachedFeatures",
    "Dataset",
    "DecodedImages",
    "FeatureCache",
    "ImageTransform",
    "LabelledImages",
    "RandomCrops",
    "decode_images",
    "decoded_bytes",
    "default_cache_dir",
    "draw_crops",
    "few_shot",
    "find_images",
    "hash_files",
    "load_dataset",
    "load_image",
    "read_batch",
    "readable_name",
    "seeded_crops",
    "select_classes",
]

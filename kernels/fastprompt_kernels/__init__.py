"""GPU and CPU operations of fastprompt. They know tensors, and nothing of CLIP, prompts or data."""

from .implementations import available_implementations
from .patch_statistics import PatchStatistics, patch_statistics
from .resized_crop import resized_crop
from .topk_similarity import selected_patches, topk_similarity

__all__ = [
    "PatchStatistics",
    "available_implementations",
    "patch_statistics",
    "resized_crop",
    "selected_patches",
    "topk_similarity",
]

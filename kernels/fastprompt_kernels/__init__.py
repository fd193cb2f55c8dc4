"""GPU and CPU operations of fastprompt. They know tensors, and nothing of CLIP, prompts or data."""

from .implementations import available_implementations
from .patch_statistics import PatchStatistics, patch_statistics
from .prefix_attention import prefix_attention
from .topk_similarity import selected_patches, topk_similarity

__all__ = [
    "PatchStatistics",
    "available_implementations",
    "patch_statistics",
    "prefix_attention",
    "selected_patches",
    "topk_similarity",
]

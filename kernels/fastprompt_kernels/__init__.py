"""GPU and CPU operations of fastprompt. They know tensors, and nothing of CLIP, prompts or data."""

from .implementations import available_implementations
from .patch_statistics import PatchStatistics, patch_statistics
from .prefix_attention import prefix_attention
from .resized_crop import resized_crop
from .sinkhorn import iterations_until, sinkhorn, sinkhorn_changes
from .topk_similarity import onnx_decompositions, selected_patches, topk_similarity

__all__ = [
    "PatchStatistics",
    "available_implementations",
    "iterations_until",
    "onnx_decompositions",
    "patch_statistics",
    "prefix_attention",
    "resized_crop",
    "selected_patches",
    "sinkhorn",
    "sinkhorn_changes",
    "topk_similarity",
]

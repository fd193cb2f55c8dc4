"""GPU and CPU operations of fastprompt. They know tensors, and nothing of CLIP, prompts or data."""

from .topk_similarity import available_implementations, selected_patches, topk_similarity

__all__ = ["available_implementations", "selected_patches", "topk_similarity"]

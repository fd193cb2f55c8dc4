"""topk_similarity."""

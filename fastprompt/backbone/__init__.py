"""The frozen CLIP-like model."""

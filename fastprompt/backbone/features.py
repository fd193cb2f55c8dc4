"""What the frozen image tower hands on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageFeatures:
    """Features of a batch of images. Nothing trainable lies before this point, so they can be cached.

    Attributes:
        pooled: (B, D), L2-normalised.
        patches: (B, P, W), before the joint projection.
    """

    pooled: Tensor
    patches: Tensor

    def __len__(self) -> int:
        return len(self.pooled)

    def to(self, device: torch.device | str) -> ImageFeatures:
        """The same features on another device."""
        return ImageFeatures(self.pooled.to(device), self.patches.to(device))

    def __getitem__(self, index: slice | Tensor) -> ImageFeatures:
        return ImageFeatures(self.pooled[index], self.patches[index])

"""What the frozen image tower says about a batch of images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageFeatures:
    """Features of B images. Nothing trainable lies before this point, so they can be cached.

    Attributes:
        pooled: (B, D) image features in the joint space, L2-normalised.
        patches: (B, P, W) patch features before the joint projection; ``Backbone.project_patches`` takes them to D.
    """

    pooled: Tensor
    patches: Tensor

    def __len__(self) -> int:
        return self.pooled.shape[0]

    def __getitem__(self, index: slice | Tensor) -> ImageFeatures:
        return ImageFeatures(self.pooled[index], self.patches[index])

    def to(self, device: torch.device | str) -> ImageFeatures:
        """The same features on another device."""
        return ImageFeatures(self.pooled.to(device), self.patches.to(device))

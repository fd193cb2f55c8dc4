"""What the frozen image tower says about a batch of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageFeatures:
    """Features of B images. Nothing trainable lies before this point, so they can be cached.

    Attributes:
        pooled: (B, D) image features in the joint space, L2-normalised.
        patches: (B, P, W) patch features before the joint projection; ``Backbone.project_patches`` takes them to D.
        fingerprint: of the backbone that made them, where that is known; ``Backbone.accept`` refuses those of another.
    """

    pooled: Tensor
    patches: Tensor
    fingerprint: str | None = None

    def __len__(self) -> int:
        return self.pooled.shape[0]

    def __getitem__(self, index: slice | Tensor) -> ImageFeatures:
        return replace(self, pooled=self.pooled[index], patches=self.patches[index])

    def to(self, device: torch.device | str) -> ImageFeatures:
        """The same features on another device; see ``queue_copy``."""
        return replace(self, pooled=queue_copy(self.pooled, device), patches=queue_copy(self.patches, device))


def join_features(parts: Sequence[ImageFeatures]) -> ImageFeatures:
    """The images of several batches of one backbone, one behind the other; at least one batch."""
    pooled, patches = torch.cat([part.pooled for part in parts]), torch.cat([part.patches for part in parts])
    return replace(parts[0], pooled=pooled, patches=patches)


def queue_copy(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on another device. A copy from the host's memory is queued: nobody waits for what is queued before.

    Memory must be page-locked for that; torch keeps it until the copy is done. A copy to the host does wait, or it
    could be read too early.
    """
    device = torch.device(device)
    if tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

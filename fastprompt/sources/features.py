"""What the frozen image tower says about a batch of images."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from fastprompt.errors import InputError

Reads = Collection[str]
"""What is read of an image: names of the tensors of `ImageFeatures`."""

POOLED = frozenset({"pooled"})
PATCHES = frozenset({"pooled", "patches"})


class ImageFeatures:
    """Features of B images. Nothing trainable lies before this point, so they can be cached.

    Attributes:
        tensors: those that there are, by the names "pooled" and "patches"; each has a row an image.
        fingerprint: of the backbone that made them, where that is known; ``Backbone.accept`` refuses those of another.
    """

    def __init__(self, pooled: Tensor, patches: Tensor | None = None, fingerprint: str | None = None) -> None:
        self.tensors = {"pooled": pooled} if patches is None else {"pooled": pooled, "patches": patches}
        self.fingerprint = fingerprint

    @property
    def pooled(self) -> Tensor:
        """(B, D) image features in the joint space, L2-normalised."""
        return self.tensors["pooled"]

    @property
    def patches(self) -> Tensor:
        """(B, P, W) patch features before the joint projection; ``Backbone.project_patches`` takes them to D.

        Raises:
            InputError: they were not loaded or not kept.
        """
        if "patches" not in self.tensors:
            raise InputError(
                "features: expected those of the patches, too, got pooled features alone: encode the images with their "
                "patches, or ask the source for reads={'pooled', 'patches'}"
            )
        return self.tensors["patches"]

    def __len__(self) -> int:
        return self.pooled.shape[0]

    def __getitem__(self, index: slice | Tensor) -> ImageFeatures:
        return self.change(lambda tensor: tensor[index])

    def keep(self, reads: Reads) -> ImageFeatures:
        """The pooled features, and the others as far as ``reads`` names them."""
        return ImageFeatures(self.pooled, self.tensors.get("patches") if "patches" in reads else None, self.fingerprint)

    def to(self, device: torch.device | str) -> ImageFeatures:
        """The same features on another device; see ``queue_copy``."""
        return self.change(lambda tensor: queue_copy(tensor, device))

    def change(self, change: Callable[[Tensor], Tensor]) -> ImageFeatures:
        """The same features with every tensor changed."""
        return ImageFeatures(**{name: change(one) for name, one in self.tensors.items()}, fingerprint=self.fingerprint)


def join_features(parts: Sequence[ImageFeatures]) -> ImageFeatures:
    """The images of several batches of one backbone, one behind the other; at least one batch, all of the same kind."""
    first = parts[0]
    joined = {name: torch.cat([part.tensors[name] for part in parts]) for name in first.tensors}
    return ImageFeatures(**joined, fingerprint=first.fingerprint)


def queue_copy(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on another device. A copy from the host's memory is queued: nobody waits for what is queued before.

    Memory must be page-locked for that; torch keeps it until the copy is done. A copy to the host does wait, or it
    could be read too early.
    """
    device = torch.device(device)
    if tensor.device.type != "cpu":
        return tensor.to(device)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

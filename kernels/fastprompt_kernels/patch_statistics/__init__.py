"""patch_statistics: what each image patch says of all classes, without the similarity of every patch to every class."""

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import check_features
from ..implementations import check_name
from . import op

__all__ = ["PatchStatistics", "patch_statistics"]


class PatchStatistics(NamedTuple):
    """Statistics over the classes, for every patch of every image.

    Attributes:
        maximum: (B, P), the largest logit.
        logsumexp: (B, P), the logarithm of the sum of the exponentials of the logits, so that the largest probability
            is exp(maximum - logsumexp).
        entropy: (B, P), of the softmax over the classes, in nats, or None where it is not wanted.
        rank: (B, P) int64, how many classes stand before the label's, or None without labels.
    """

    maximum: Tensor
    logsumexp: Tensor
    entropy: Tensor | None
    rank: Tensor | None


def patch_statistics(
    patches: Tensor,
    prompts: Tensor,
    *,
    scale: float = 1.0,
    labels: Tensor | None = None,
    entropy: bool = True,
    impl: str = "auto",
) -> PatchStatistics:
    """Maximum, log-sum-exp and entropy over the classes of the logits of every patch, and the rank of a label.

        logits[b, p, c] = scale * <patches[b, p], prompts[c]>

    exp(maximum - logsumexp) is the local score of GL-MCM (Miyai et al., IJCV 2025, arXiv:2304.04521); patches where the
    label has a rank of K or more are the background of LoCoOp (Miyai et al., NeurIPS 2023, arXiv:2306.01293), whose
    entropy it raises. Nothing is normalised here. The (B, P, C) logits are never held as a whole, but for up to 16 MiB
    of them, which "blocked" keeps for the backward pass.

    Products are accumulated in float32 (float64 for float64 inputs) whatever the dtype of the inputs, and maximum,
    logsumexp and entropy have that dtype. Under autocast the inputs are cast to autocast's dtype first. Gradients have
    the dtype of their inputs; the one of the maximum goes to the class of the lowest index among equal ones, and the
    rank has none. They cannot be differentiated again, except through the reference. A logit of minus infinity has
    probability 0.

    Args:
        patches: (B, P, D), the patch features of B images.
        prompts: (C, D), the text features of C classes; average them over prompts first if there are several.
        scale: a finite number above 0.
        labels: (B,) integers from 0 to C - 1, the class of every image; asks for the rank. It counts the classes with a
            larger logit and those with an equal one and a lower index. Labels that are compiled or not on the CPU are
            not checked, because that would wait for the device: one out of range has rank C or raises.
        entropy: whether it is wanted. GL-MCM's score does not need it, and without it inference on a CPU takes less
            time and memory.
        impl: "reference" (plain torch, the definition), "blocked" (plain torch, bounded memory, any device), "triton"
            (fused kernels: CUDA and ROCm, float32, float16 and bfloat16), or "auto": triton where it can run, blocked
            elsewhere. What is named explicitly is run or refused, never replaced.

    Returns:
        PatchStatistics.

    Raises:
        TypeError: an argument is not of the kind named above, or the two dtypes differ.
        ValueError: shapes, devices or labels do not fit, an unknown name, or an implementation that cannot run here.
    """
    check_features(patches, prompts, name="prompts", axes="(C, D)")
    if not 0 < scale < inf:
        raise ValueError(f"scale must be a finite number above 0, got {scale}")
    if labels is not None:
        _check_labels(labels, patches, len(prompts))
    check_name(impl)
    return PatchStatistics(*op.patch_statistics(patches, prompts, float(scale), labels, entropy, impl))


def _check_labels(labels: Tensor, patches: Tensor, C: int) -> None:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        found = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a tensor of integers, got {found}")
    if labels.shape != patches.shape[:1]:
        raise ValueError(f"labels must have shape ({len(patches)},), one per image, got {tuple(labels.shape)}")
    if labels.device != patches.device:
        raise ValueError(f"patches and labels must be on one device, got {patches.device} and {labels.device}")
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and ((labels < 0) | (labels >= C)).any():
        raise ValueError(f"labels must lie between 0 and {C - 1}, got {labels.min()} to {labels.max()}")

"""topk_similarity: the mean similarity of a prompt to the image patches that are most like it."""

from collections.abc import Sequence
from math import lcm
from operator import index

from torch import Tensor

from ..arguments import check_features
from ..implementations import check_name
from . import op, reference
from .onnx import onnx_decompositions

__all__ = ["onnx_decompositions", "selected_patches", "topk_similarity"]

IMPLEMENTATIONS = ("auto", "reference", "dense", "blocked", "triton")
K = int | Sequence[int] | Sequence[Sequence[int]]


def topk_similarity(patches: Tensor, prompts: Tensor, k: K, *, reduce: str = "none", impl: str = "auto") -> Tensor:
    """The mean of the k largest similarities of every prompt to the patches of every image.

        values[b, n, c] = 1/k * sum of the k largest of { <patches[b, p], prompts[n, c]> : p = 1..P }

    This is the sparse pooling of GalLoP (Lafon et al., ECCV 2024, arXiv:2407.01400). Nothing is normalised here.

    The products are accumulated, and the patches selected, in float32 (float64 for float64 inputs) whatever the dtype
    of the inputs, and the result has that dtype. Under autocast the inputs are cast to autocast's dtype first.
    Gradients have the dtype of their inputs. Among equal similarities the patch of the lowest index counts as the
    larger: every implementation gives the gradient to the same patches. The gradient cannot be differentiated again,
    except through the reference.

    Args:
        patches: (B, P, D), the patch features of B images.
        prompts: (N, C, D), the text features of C classes under N prompts.
        k: how many patches count: one int, one int per prompt, or one sequence of ints per prompt (its scales, whose
            means are averaged). A k larger than P means all P patches.
        reduce: "none", or "mean" to average over the prompts as well.
        impl: "reference" (plain torch, the definition), "dense" (plain torch, some images at a time, any device),
            "blocked" (tiles and sparse gradients, for the CPU), "triton" (fused kernels: CUDA and ROCm, float32,
            float16 and bfloat16, k up to 64), or "auto": triton where it can run; else on a CPU blocked, with the
            gradients of dense where these are faster, and dense elsewhere. What is named is run or refused, never
            replaced.

    Returns:
        (B, N, C), or (B, C) with reduce="mean".

    Raises:
        TypeError: an argument is not of the kind named above, or the two dtypes differ.
        ValueError: shapes or devices do not fit, k < 1, an unknown name, or an implementation that cannot run here.
    """
    scales = _checked(patches, prompts, k)
    if reduce not in ("none", "mean"):
        raise ValueError(f"reduce must be 'none' or 'mean', got {reduce!r}")
    check_name(impl, IMPLEMENTATIONS)
    values = op.topk_similarity(patches, prompts, scales, impl)
    return values.mean(1) if reduce == "mean" else values


def selected_patches(patches: Tensor, prompts: Tensor, k: K) -> Tensor:
    """Which patches topk_similarity averages: for drawing, so it holds the whole similarity in memory.

    Args:
        patches: (B, P, D), as in topk_similarity.
        prompts: (N, C, D), as in topk_similarity; slice it to ask for some classes only.
        k: as in topk_similarity; of several scales the largest counts.

    Returns:
        (B, N, C, P) bool.
    """
    scales = _checked(patches, prompts, k)
    return reference.selected_patches(patches.detach(), prompts.detach(), scales)


def _checked(patches: Tensor, prompts: Tensor, k: K) -> list[list[int]]:
    """The scales of every prompt, none larger than P, once the arguments are known to fit."""
    check_features(patches, prompts, name="prompts", axes="(N, C, D)")
    return [[min(scale, patches.shape[1]) for scale in scales] for scales in _scales(k, len(prompts))]


def _scales(k: K, N: int) -> list[list[int]]:
    """The argument k as one list of scales per prompt, all equally long."""
    expected = f"k must be an int, {N} ints or {N} sequences of ints (one per prompt), got {k!r}"
    try:
        rows = [k] * N if isinstance(k, int) else list(k)
        scales = [[row] if isinstance(row, int) else [index(scale) for scale in row] for row in rows]
    except TypeError as error:
        raise TypeError(expected) from error
    if len(scales) != N or not all(scales):
        raise ValueError(expected)
    if min(min(row) for row in scales) < 1:
        raise ValueError(f"k must be at least 1, got {k!r}")
    # Repeating all scales of a prompt leaves their mean as it is.
    length = lcm(*map(len, scales))
    return [row * (length // len(row)) for row in scales]

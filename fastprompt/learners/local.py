"""GalLoP's local scores: patches projected, normalised, and compared with prompts that each keep their best ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from fastprompt_kernels import topk_similarity
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastprompt.backbone.backbone import at_least_float32

# Bytes of projected features that are held at a time where they are not kept. The backward pass makes them again, for a
# fraction of what the similarity costs: kept for all images, they would take more memory than everything else.
BYTES_ON_CPU, BYTES = 7 * 2**18, 2**26


def unit_patches(features: Tensor, projection: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Project and L2-normalise features (B, P, W) to (B, P, D), in float32 at least, or in the precision asked for."""
    unit = F.normalize(at_least_float32(features if projection is None else features @ projection), dim=-1)
    return unit if dtype is None else unit.to(dtype)


def pooled_similarity(
    features: Tensor, prompts: Tensor, k: Sequence[int], projection: Tensor | None = None, *, keep: bool = True
) -> Tensor:
    """Compute the mean cosine of every prompt with the k patches of an image that are most like it, (B, N, C).

    In float32, or float64 for float64 prompts, whatever the precision of the products.

    Args:
        features: (B, P, W) patches before the projection, or (B, P, D) behind it.
        prompts: (N, C, D), L2-normalised, in the precision in which cosines are multiplied out.
        k: patches that each prompt keeps, or one number for all; more than P means all patches.
        projection: (W, D) where the features are not projected yet.
        keep: whether normalised features are kept for the backward pass; otherwise it makes them again, and some images
            at a time are held.
    """
    k = [min(count, features.shape[1]) for count in k]
    k = k * len(prompts) if len(k) == 1 else k
    if keep:
        return topk_similarity(unit_patches(features, projection, prompts.dtype), prompts, k)
    return _Pooled.apply(features, prompts, projection, k)


class _Pooled(torch.autograd.Function):
    """Pooled cosines (B, n, C), some images at a time; kept for the backward pass are the selected patches alone."""

    @staticmethod
    def forward(ctx, features: Tensor, prompts: Tensor, projection: Tensor | None, k: list[int]) -> Tensor:  # noqa: ANN001
        keep, values, selected = any(ctx.needs_input_grad), None, None
        with torch.autocast(features.device.type, enabled=False):
            for images in _parts(features, prompts):
                unit = unit_patches(features[images], projection, prompts.dtype)
                part = torch.ops.fastprompt.topk_similarity(unit, prompts, k, keep, "auto")
                if values is None:
                    values, selected = (one.new_empty(len(features), *one.shape[1:]) for one in part)
                values[images] = part[0]
                if keep:
                    selected[images] = part[1]
        ctx.k = k
        ctx.save_for_backward(features, prompts, projection, selected)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN001
        *inputs, selected = ctx.saved_tensors
        features, prompts, projection = inputs
        wanted = ctx.needs_input_grad[:3]
        grad_features, grad_prompts, grad_projection = (
            torch.zeros_like(like) if needed else None for needed, like in zip(wanted, inputs, strict=True)
        )
        for images in _parts(features, prompts):
            part = features[images].detach().requires_grad_(wanted[0])
            matrix = None if projection is None else projection.detach().requires_grad_(wanted[2])
            with torch.enable_grad():
                unit = unit_patches(part, matrix, prompts.dtype)
            grad_unit, grad_text = torch.ops.fastprompt.topk_similarity_grad(
                grad[images],
                unit.detach() if wanted[1] else None,
                prompts if unit.requires_grad else None,
                selected[images],
                ctx.k,
                features.shape[1],
                "auto",
            )
            if wanted[1]:
                grad_prompts += grad_text
            del grad_text  # or it would be there beside the next one
            if unit.requires_grad:
                unit.backward(grad_unit)
            if wanted[0]:
                grad_features[images] = part.grad
            if wanted[2]:
                grad_projection += matrix.grad
        return grad_features, grad_prompts, grad_projection, None


def _parts(features: Tensor, prompts: Tensor) -> Iterator[slice]:
    """As many images at a time as their projected features may take memory; one part where there is no image."""
    per_image = features.shape[1] * prompts.shape[-1] * prompts.element_size()
    at_once = max(1, (BYTES_ON_CPU if features.device.type == "cpu" else BYTES) // max(per_image, 1))
    return (slice(start, start + at_once) for start in range(0, max(len(features), 1), at_once))

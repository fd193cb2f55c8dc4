"""GalLoP's local logits without the similarity of all patches, classes and prompts in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import fastprompt_kernels  # noqa: F401  registers the operators
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastprompt.backbone.backbone import at_least_float32
from fastprompt.errors import InputError

# Bytes of projected features that are held at a time. The backward pass makes them again, for a fraction of what the
# similarity costs: kept for all images, they would take more memory than everything else.
BYTES_ON_CPU, BYTES = 7 * 2**18, 2**26


class TopKLocalHead(nn.Module):
    """Projection, normalisation, cosines and top-k pooling of GalLoP's local features (arXiv 2407.01400).

    In place of the two projections, the division by the norm, the ``einsum`` to (B, P, C, n) and ``topk_reduce`` of the
    published code. It has no parameters.

    Args:
        topk: patches that each local prompt keeps, or one number for all; more than P means all patches.
    """

    def __init__(self, topk: Sequence[int] = (5, 10, 15, 20)) -> None:
        super().__init__()
        if not topk or min(topk) < 1:
            raise InputError(f"topk: expected one number of patches of at least 1 per local prompt, got {tuple(topk)}")
        self.topk = tuple(topk)

    def forward(self, local_features: Tensor, local_text_features: Tensor, projection: Tensor | None = None) -> Tensor:
        """Pooled local cosines (B, C, n), in float32, or float64 for float64 inputs. Obeys autocast.

        Args:
            local_features: (B, P, W) before the projections, or (B, P, D) behind them.
            local_text_features: (C, n, D), L2-normalised.
            projection: (W, D) where the features are not projected yet: in GalLoP
                ``local_proj.linear.weight.T @ visual.proj``, in which order the two cost least.

        Raises:
            InputError: shapes do not fit, or not as many prompts as ``topk`` says.
        """
        self._check(local_features, local_text_features, projection)
        device = local_features.device.type
        if torch.is_autocast_enabled(device):
            cast = [local_features, local_text_features, projection]
            dtype = torch.get_autocast_dtype(device)
            local_features, local_text_features, projection = (x if x is None else x.to(dtype) for x in cast)
        prompts = local_text_features.transpose(0, 1).contiguous()  # (n, C, D)
        k = [min(count, local_features.shape[1]) for count in self.topk]
        k = k * len(prompts) if len(k) == 1 else k
        return _Pooled.apply(local_features, prompts, projection, k).transpose(1, 2)

    def _check(self, features: Tensor, text: Tensor, projection: Tensor | None) -> None:
        if features.dim() != 3 or text.dim() != 3:
            raise InputError(
                "expected local_features (B, P, W) and local_text_features (C, n, D), "
                f"got {tuple(features.shape)} and {tuple(text.shape)}"
            )
        if len(self.topk) not in (1, text.shape[1]):
            raise InputError(
                f"topk: expected 1 or {text.shape[1]} numbers for {text.shape[1]} local prompts, got {self.topk}"
            )
        width, expected = features.shape[-1], text.shape[-1]
        if projection is not None and tuple(projection.shape) != (width, expected):
            raise InputError(f"projection: expected shape {(width, expected)}, got {tuple(projection.shape)}")
        if projection is None and width != expected:
            raise InputError(
                f"local_features: expected a last axis of {expected} as in local_text_features, got {width}; "
                "give the projection, if they are not projected yet"
            )


class _Pooled(torch.autograd.Function):
    """Pooled cosines (B, n, C), some images at a time; kept for the backward pass are the selected patches alone."""

    @staticmethod
    def forward(ctx, features: Tensor, prompts: Tensor, projection: Tensor | None, k: list[int]) -> Tensor:  # noqa: ANN001
        keep, values, selected = any(ctx.needs_input_grad), None, None
        with torch.autocast(features.device.type, enabled=False):
            for images in _parts(features, prompts):
                unit = _unit(features[images], projection, prompts.dtype)
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
        of_features, of_prompts, of_projection = (
            torch.zeros_like(like) if needed else None for needed, like in zip(wanted, inputs, strict=True)
        )
        for images in _parts(features, prompts):
            part = features[images].detach().requires_grad_(wanted[0])
            matrix = None if projection is None else projection.detach().requires_grad_(wanted[2])
            with torch.enable_grad():
                unit = _unit(part, matrix, prompts.dtype)
            of_unit, of_text = torch.ops.fastprompt.topk_similarity_grad(
                grad[images],
                unit.detach() if wanted[1] else None,
                prompts if unit.requires_grad else None,
                selected[images],
                ctx.k,
                features.shape[1],
                "auto",
            )
            if wanted[1]:
                of_prompts += of_text
            del of_text  # or it would be there beside the next one
            if unit.requires_grad:
                unit.backward(of_unit)
            if wanted[0]:
                of_features[images] = part.grad
            if wanted[2]:
                of_projection += matrix.grad
        return of_features, of_prompts, of_projection, None


def _parts(features: Tensor, prompts: Tensor) -> Iterator[slice]:
    """As many images at a time as their projected features may take memory; one part where there is no image."""
    per_image = features.shape[1] * prompts.shape[-1] * prompts.element_size()
    at_once = max(1, (BYTES_ON_CPU if features.device.type == "cpu" else BYTES) // max(per_image, 1))
    return (slice(start, start + at_once) for start in range(0, max(len(features), 1), at_once))


def _unit(features: Tensor, projection: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Normalised features (B, P, D) of features (B, P, W)."""
    projected = features if projection is None else features @ projection
    return F.normalize(at_least_float32(projected), dim=-1).to(dtype)

"""GalLoP's local logits without the similarity of all patches, classes and prompts in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastprompt.errors import InputError
from fastprompt.learners.local import pooled_similarity


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
        return pooled_similarity(local_features, prompts, self.topk, projection, keep=False).transpose(1, 2)

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

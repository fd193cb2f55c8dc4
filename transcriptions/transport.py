"""Plain transcriptions of what PLOT, SOT-GLP and DuAl-PT have in common: dense tensors, the published loop."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def published_plan(cosines: Tensor) -> Tensor:
    """Plans (X, M, N) of cosines (X, M, N)."""
    with torch.no_grad():
        kernel = torch.exp(-(1 - cosines) / 0.1)
        M, N = kernel.shape[1:]
        rows, columns = torch.ones(len(kernel), M).to(kernel), torch.ones(len(kernel), N).to(kernel)
        for _ in range(100):
            before = rows
            rows = (1 / M) / torch.einsum("xmn,xn->xm", kernel, columns)
            columns = (1 / N) / torch.einsum("xmn,xm->xn", kernel, rows)
            if (rows - before).abs().mean().item() < 1e-2:
                break
        return torch.einsum("xm,xmn,xn->xmn", rows, kernel, columns)


def transported(local: Tensor, text: Tensor, keep: Tensor | None = None) -> Tensor:
    """The plans, and the scores (B, C), of patches (B, P, D) and prompts (N, C, D)."""
    cosines = torch.einsum("bpd,ncd->bpcn", local, text)
    if keep is not None:
        best = cosines.mean(-1).topk(keep, dim=1).indices  # (B, keep, C)
        cosines = cosines.gather(1, best[..., None].expand(-1, -1, -1, len(text)))
    cosines = cosines.permute(0, 2, 1, 3)  # (B, C, P, N)
    plan = published_plan(cosines.flatten(0, 1)).view(cosines.shape)
    return plan, (plan * cosines).sum((2, 3))


def local_features(learner: Any, features: Any) -> Tensor:
    """Patch features (B, P, D) behind the projection of a CLIP of open_clip."""
    return F.normalize(features.patches @ learner.backbone.model.visual.proj, dim=-1)

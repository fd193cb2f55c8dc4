"""GalLoP: global prompts for the image, local prompts for its most telling patches at several scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from fastprompt_kernels import selected_patches
from torch import Tensor, nn

from fastprompt.backbone import Backbone, ImageFeatures
from fastprompt.documents import check_type
from fastprompt.errors import InputError
from fastprompt.learners.base import Scores, check_axes, check_prompts
from fastprompt.learners.local import pooled_similarity, unit_patches
from fastprompt.learners.loss import drawn_cross_entropy, drawn_prompts, prompt_cross_entropy
from fastprompt.learners.recipe import Recipe
from fastprompt.learners.text import TextLearner, initial_context

CODE = "GalLoP's code, scripts/run_*.sh: ViT-B/16, 16 shots; other numbers of shots are not published"


class GalLoP(TextLearner):
    """GalLoP: global prompts for the image, local prompts for its best patches at several scales (arXiv 2407.01400).

    m global prompts are compared with the pooled feature. n local prompts are compared with all patches, after a
    learned projection that starts as the identity; prompt j keeps the mean of the k_j best patches of each class.
    The prediction averages both. This follows the published code.

    Args:
        backbone: the frozen model.
        class_names: C names; the prompt is "<context> <name>", without a full stop.
        global_prompts: m, prompts that are compared with the whole image.
        k: patches kept by each local prompt, one number a prompt, so n = len(k); more than P means all patches.
        dropout: share of the global prompts left out per image in the loss. Even at 0 the prompts are drawn with
            replacement, as in the published code.
        context: words to start from, or a number of tokens with random start.
    """

    method: ClassVar[str] = "gallop"
    contexts_named: ClassVar[tuple[str, ...]] = ("global_prompts", "local_prompts")
    foreign_names: ClassVar[Mapping[str, str | None]] = {
        "global_prompt": "global_prompts",
        "local_prompts": "local_prompts",
        "local_proj.linear.weight": "local_projection",
    }
    keeps_underscores: ClassVar[bool] = True
    telling: ClassVar[tuple[str, ...]] = ("k",)
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "default": Recipe(source=CODE, epochs=200, weight_decay=1e-2, warmup_epochs=0),
        "imagenet": Recipe(source=CODE, epochs=50, batch_size=128, weight_decay=1e-2, warmup_epochs=0),
        "sun397": Recipe(source=CODE, epochs=200, batch_size=128, weight_decay=1e-2, warmup_epochs=0),
        "eurosat": Recipe(source=CODE, epochs=200, batch_size=10, weight_decay=1e-2, warmup_epochs=0),
    }

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        *,
        global_prompts: int = 4,
        k: Sequence[int] = (5, 10, 15, 20),
        dropout: float = 0.75,
        context: int | str = "a photo of a",
    ) -> None:
        _check(global_prompts, k, dropout)
        starts = torch.stack([initial_context(backbone, context) for _ in range(global_prompts + len(k))])
        super().__init__(backbone, class_names, context_tokens=starts.shape[1], suffix="")
        self.k, self.dropout = tuple(k), dropout
        self.global_prompts = nn.Parameter(starts[:global_prompts].clone())  # (m, M, W)
        self.local_prompts = nn.Parameter(starts[global_prompts:].clone())  # (n, M, W)
        self.local_projection = nn.Parameter(torch.eye(backbone.patch_width, device=backbone.device))

    @classmethod
    def read_foreign(cls, state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Learner``; what the training script was not given is as published."""
        shared, local = (check_axes(state, name, 3) for name in ("global_prompt", "local_prompts"))
        k, dropout = arguments.get("topk", [5, 10, 15, 20]), arguments.get("global_dropout_p", 0.75)
        check_type(k, Sequence[int], "topk of its training script")
        check_type(dropout, float, "global_dropout_p of its training script")
        k = list(k) * (len(local) if len(k) == 1 else 1)
        if len(k) != len(local):
            raise InputError(f"topk of its training script: expected {len(local)} numbers, as local prompts, got {k}")
        return {"global_prompts": len(shared), "k": k, "dropout": dropout, "context": local.shape[1]}

    def encode_text(self) -> Tensor:
        """See ``TextLearner``; G = m + n, global prompts first."""
        contexts = torch.cat([self.global_prompts, self.local_prompts])
        return self.backbone.encode_prompts(contexts, self.class_tokens)

    def _split_text(self) -> tuple[Tensor, Tensor]:
        """Text features of the global (m, C, D) and of the local prompts (n, C, D)."""
        return self.text_features().split([len(self.global_prompts), len(self.local_prompts)])

    def local_features(self, features: ImageFeatures) -> Tensor:
        """Patch features (B, P, D) behind the learned and the frozen projection, L2-normalised."""
        return unit_patches(self._projected(features))

    def mean_text(self, features: ImageFeatures | None = None) -> tuple[Tensor, Tensor]:
        """See ``PromptLearner``: global prompts score the pooled feature, local prompts the patches."""
        of_global, of_local = self._split_text()
        return of_global.mean(dim=0), of_local.mean(dim=0)

    def forward(self, features: ImageFeatures) -> Scores:
        """Scores of B images; parts "global" (B, m, C) and "local" (B, n, C) are raw cosines."""
        features = self.backbone.accept(features)
        of_global, of_local = self._split_text()
        global_cosines = torch.einsum("bd,mcd->bmc", features.pooled, of_global)
        local_cosines = self._score_patches(features, of_local)
        mean = (global_cosines.mean(dim=1) + local_cosines.mean(dim=1)) / 2
        return Scores(self.backbone.logit_scale * mean, {"global": global_cosines, "local": local_cosines})

    def _score_patches(self, features: ImageFeatures, prompts: Tensor) -> Tensor:
        """Local scores (B, n, C) for prompts (n, C, D), multiplied out in the tower's precision."""
        return pooled_similarity(self._projected(features), prompts.to(self.backbone.dtype), self.k)

    def _projected(self, features: ImageFeatures) -> Tensor:
        """Patch features (B, P, D) behind the learned and the frozen projection, in the tower's precision."""
        return self.backbone.project_patches(features.patches, self.local_projection)

    def draw_prompts(self, images: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw the global prompts that count for each image, (images, kept); see ``drawn_prompts``."""
        return drawn_prompts(images, len(self.global_prompts), self.dropout, self.backbone.device, generator)

    def loss(self, scores: Scores, labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """See ``Learner``: cross-entropy of the drawn global prompts, plus that of every local prompt."""
        scale, drawn = self.backbone.logit_scale, self.draw_prompts(len(labels), generator)
        return drawn_cross_entropy(scores.parts["global"], labels, scale, drawn) + prompt_cross_entropy(
            scores.parts["local"], labels, scale
        )

    @torch.no_grad()
    def selected_patches(self, features: ImageFeatures, class_index: Tensor) -> Tensor:
        """Which patches each local prompt kept for one class per image, (B, n, P) bool.

        Args:
            features: of B images.
            class_index: (B,).
        """
        features = self.backbone.accept(features)
        text = self._split_text()[1].to(self.backbone.dtype)
        local = unit_patches(self._projected(features), dtype=text.dtype)
        per_image = [
            selected_patches(image[None], text[:, index : index + 1], self.k)[0, :, 0]
            for image, index in zip(local, class_index.tolist(), strict=True)
        ]
        return torch.stack(per_image)

    def explain(self, features: ImageFeatures, class_index: Tensor) -> dict[str, Tensor]:
        """See ``Learner``: for each local prompt the patches that it kept."""
        selected = self.selected_patches(features, class_index).unbind(dim=1)
        titles = (f"prompt {number}: k = {k}" for number, k in enumerate(self.k, start=1))
        return dict(zip(titles, selected, strict=True))


def _check(global_prompts: int, k: Sequence[int], dropout: float) -> None:
    check_prompts("global_prompts", global_prompts)
    if not k or min(k) < 1:
        raise InputError(f"k: expected one number of patches of at least 1 per local prompt, got {tuple(k)}")
    if not 0 <= dropout <= 1:
        raise InputError(f"dropout: expected a share between 0 and 1, got {dropout}")

"""CoCoOp: one learned context, shifted by what a small network makes of each image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from fastprompt.backbone import ImageFeatures
from fastprompt.learners.conditional import META_NET, ImageConditional
from fastprompt.learners.recipe import Recipe
from fastprompt.sources import POOLED


class CoCoOp(ImageConditional):
    """CoCoOp: one learned context, shifted by what a small network makes of each image (arXiv 2203.05557).

    It follows the published code, but encodes all images of a batch together instead of one after the other. The
    context of image b is v_i + h(z_b): every learned token v_i is shifted alike by what the meta-net h makes of the
    L2-normalised pooled feature z_b. Logits are scaled cosines of z_b with the image's own text features.

    Args:
        backbone: the frozen model.
        class_names: C names; the prompt is "<context> <name>.".
        context: words to start from, or a number of tokens with random start.
    """

    method: ClassVar[str] = "cocoop"
    reads: ClassVar[frozenset[str]] = POOLED
    foreign_names: ClassVar[Mapping[str, str | None]] = {"ctx": "context", **{name: name for name in META_NET}}
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "default": Recipe(source="CoCoOp's code, vit_b16_c4_ep10_batch1_ctxv1", epochs=10, batch_size=1),
    }

    def contexts(self, features: ImageFeatures) -> Tensor:
        """See ``ImageConditional``."""
        shift = self.meta_net(features.pooled.to(self.context.dtype))  # (B, W)
        return self.context + shift[:, None]

"""CoCoOp: one learned context, shifted by what a small network makes of each image."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastprompt.backbone import ImageFeatures
from fastprompt.learners.conditional import ImageConditional


class CoCoOp(ImageConditional):
    """CoCoOp (arXiv 2203.05557), following its published code, with all images of a batch encoded together.

    The context of image b is v_i + h(z_b): every learned token v_i is shifted alike by what the meta-net h makes of the
    L2-normalised pooled feature z_b. Logits are scaled cosines of z_b with the image's own text features.

    Args:
        backbone: the frozen model.
        class_names: C names; the prompt is "<context> <name>.".
        context: words to start from, or a number of tokens with random start.
    """

    method: ClassVar[str] = "cocoop"

    def contexts(self, features: ImageFeatures) -> Tensor:
        """See ``ImageConditional``."""
        shift = self.meta_net(features.pooled.to(self.context.dtype))  # (B, W)
        return self.context + shift[:, None]

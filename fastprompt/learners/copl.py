"""CoPL: the patches of each image say which words of the context count, and what is added to them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from fastprompt.backbone import ImageFeatures
from fastprompt.learners.conditional import ImageConditional
from fastprompt.learners.recipe import Recipe


class CoPL(ImageConditional):
    """CoPL: the patches of each image weigh the words of the context and add to them (arXiv 2307.00910).

    This is our reading of the paper's abstract; its equations were not available to us. The meta-net h makes a token
    pi_p = h(f_p) of every L2-normalised patch feature f_p in the joint space. A context token v_i attends to them with
    scores s_ip = <v_i, pi_p> / sqrt(W) and takes in what it finds; tokens that match some patch well weigh more. The
    dynamic token of an image is

        w_i (v_i + sum_p softmax_p(s_ip) pi_p),  w_i = M softmax_i(max_p s_ip)

    so a meta-net that answers zero leaves CoOp's context. Everything else is as in CoCoOp.

    Args:
        backbone: the frozen model.
        class_names: C names; the prompt is "<context> <name>.".
        context: words to start from, or a number of tokens with random start.
    """

    method: ClassVar[str] = "copl"
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "default": Recipe(source="CoCoOp's, for CoPL's own were not available to us", epochs=10, batch_size=1),
    }

    def contexts(self, features: ImageFeatures) -> Tensor:
        """See ``ImageConditional``."""
        patches = self.meta_net(self.local_features(features).to(self.context.dtype))  # (B, P, W)
        tokens, width = self.context.shape
        scores = self.context @ patches.transpose(1, 2) / math.sqrt(width)  # (B, M, P)
        found = scores.softmax(dim=2) @ patches  # (B, M, W)
        weights = tokens * scores.amax(dim=2).softmax(dim=1)  # (B, M)
        return weights[..., None] * (self.context + found)

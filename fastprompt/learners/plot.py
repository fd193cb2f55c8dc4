"""PLOT: several prompts a class, matched with the patches of an image by optimal transport."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt.backbone import Backbone, ImageFeatures
from fastprompt.learners.base import Learner, Scores, check_prompts, initial_context
from fastprompt.learners.coop import EPOCHS
from fastprompt.learners.recipe import Recipe
from fastprompt.learners.transport import Transport, transport_similarity

CODE = "PLOT's code, plot-coop/train.py, which sets the epochs, and configs/trainers/PLOT/rn50.yaml: ResNet-50"
SMALL = f"{CODE}, which notes this batch size for it"


class PLOT(Learner):
    """PLOT: several prompts a class, matched with the patches by optimal transport (arXiv 2210.01253).

    The N prompts of a class and the P patches of an image are two uniform distributions. Their entropic transport plan
    T, with cost 1 - cosine, is computed without gradient, and the logit is s * sum of T * cosine. Its iterations stop
    by a rule that looks at the whole batch, so a logit depends slightly on the other images of its batch. This follows
    the published code, with contexts shared by all classes.

    That code has a ResNet-50 whose patches went through attention pooling: ``load_backbone(..., patches="published")``
    gives these. By default they are the value-path features of ``Backbone.encode_images``.

    Args:
        backbone: the frozen model.
        class_names: C names; the prompt is "<context> <name>.".
        prompts: N, contexts to learn.
        context: words to start from, or a number of tokens with random start.
        eps: strength of the entropy term of the transport.
        iterations: of the transport, at most.
        tolerance: iteration stops when the rows' scaling changes by less on average over the batch; 0 never stops it.
        pooled: add the logits of the pooled feature, as published for ImageNet: with the mean of a class's prompts,
            taken before they are normalised.
    """

    method: ClassVar[str] = "plot"
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "default": Recipe(source=CODE, epochs=EPOCHS, batch_size=128),
        **{name: Recipe(source=SMALL, epochs=EPOCHS) for name in ("flowers102", "fgvc_aircraft", "stanford_cars")},
        "imagenet": Recipe(source=CODE, epochs=50, batch_size=128, options={"pooled": True}),
    }

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        *,
        prompts: int = 4,
        context: int | str = 16,
        eps: float = 0.1,
        iterations: int = 100,
        tolerance: float = 1e-2,
        pooled: bool = False,
    ) -> None:
        transport = Transport(eps, iterations, tolerance)
        starts = initial_contexts(backbone, context, prompts)
        options = {
            "prompts": prompts, "context": context, "eps": eps, "iterations": iterations, "tolerance": tolerance,
            "pooled": pooled,
        }  # fmt: skip
        super().__init__(backbone, class_names, context_tokens=starts.shape[1], suffix=".", options=options)
        self.transport, self.pooled = transport, pooled
        self.contexts = nn.Parameter(starts)  # (N, M, W)

    def encode_text(self) -> Tensor:
        """See ``Learner``; G = N + 1, the last for the pooled feature: the mean of the prompts before normalisation."""
        text = self.backbone.encode_prompts(self.contexts, self.class_tokens, normalise=False)
        return F.normalize(torch.cat([text, text.mean(dim=0, keepdim=True)]), dim=-1)

    def mean_text(self, features: ImageFeatures) -> tuple[Tensor, Tensor]:
        """See ``Learner``; both are the mean of the N normalised prompts."""
        mean = self.text_features()[:-1].mean(dim=0)
        return mean, mean

    def forward(self, features: ImageFeatures) -> Scores:
        """Scores of B images: scaled transport similarities."""
        features, text = self.backbone.accept(features), self.text_features()
        cosines = transport_similarity(self.local_features(features), text[:-1], self.transport)
        if self.pooled:
            cosines = cosines + features.pooled @ text[-1].T
        return Scores(self.backbone.logit_scale * cosines)


def initial_contexts(backbone: Backbone, context: int | str, prompts: int) -> Tensor:
    """The start (prompts, M, W) of several contexts, each as by ``initial_context``."""
    check_prompts("prompts", prompts)
    return torch.stack([initial_context(backbone, context) for _ in range(prompts)])

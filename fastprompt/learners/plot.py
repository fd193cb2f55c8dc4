"""PLOT: several prompts a class, matched with the patches of an image by optimal transport."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprompt.backbone import Backbone, ImageFeatures
from fastprompt.learners.base import Scores
from fastprompt.learners.coop import EPOCHS
from fastprompt.learners.recipe import Recipe
from fastprompt.learners.text import TextLearner, initial_contexts
from fastprompt.learners.transport import Transport, transport_similarity

CODE = "PLOT's code, plot-coop/train.py, which sets the epochs, and configs/trainers/PLOT/rn50.yaml: ResNet-50"
SMALL = f"{CODE}, which notes this batch size for it"


class PLOT(TextLearner):
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
    independent_images: ClassVar[bool] = False
    contexts_named: ClassVar[tuple[str, ...]] = ("contexts",)
    foreign_names: ClassVar[Mapping[str, str | None]] = {"ctx": "contexts"}
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
        super().__init__(backbone, class_names, context_tokens=starts.shape[1], suffix=".")
        self.transport, self.pooled = transport, pooled
        self.contexts = nn.Parameter(starts)  # (N, M, W)

    @classmethod
    def recognises(cls, state: Mapping[str, Tensor]) -> int:
        """See ``Learner``; its embedded names are some times as many as its contexts, where CoOp's are as many."""
        shapes = [state[name].shape for name in ("ctx", "token_suffix") if name in state]
        if [len(shape) for shape in shapes] != [3, 3] or not 0 < shapes[0][0] < shapes[1][0]:
            return 0
        known = super().recognises(state)
        return known + 1 if known and shapes[1][0] % shapes[0][0] == 0 else 0

    @classmethod
    def read_foreign(cls, state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> dict[str, Any]:
        """See ``Learner``; the rest is as published, except for ImageNet."""
        prompts, tokens, _ = state["ctx"].shape
        return {"prompts": prompts, "context": tokens}

    def encode_text(self) -> Tensor:
        """See ``TextLearner``; G = N + 1, the last for the pooled feature: the mean of the prompts, not normalised."""
        text = self.backbone.encode_prompts(self.contexts, self.class_tokens, normalise=False)
        return F.normalize(torch.cat([text, text.mean(dim=0, keepdim=True)]), dim=-1)

    def mean_text(self, features: ImageFeatures | None = None) -> tuple[Tensor, Tensor]:
        """See ``PromptLearner``; both are the mean of the N normalised prompts."""
        mean = self.text_features()[:-1].mean(dim=0)
        return mean, mean

    def forward(self, features: ImageFeatures) -> Scores:
        """Scores of B images: scaled transport similarities."""
        features, text = self.backbone.accept(features), self.text_features()
        cosines = transport_similarity(self.local_features(features), text[:-1], self.transport)
        if self.pooled:
            cosines = cosines + features.pooled @ text[-1].T
        return Scores(self.backbone.logit_scale * cosines)

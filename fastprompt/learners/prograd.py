"""ProGrad: CoOp that takes no step against what zero-shot CLIP knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastprompt.backbone import Backbone, ImageFeatures
from fastprompt.errors import InputError
from fastprompt.learners.base import Scores, check_weight
from fastprompt.learners.coop import EPOCHS, CoOp
from fastprompt.learners.holder import check_backbone
from fastprompt.learners.recipe import Recipe
from fastprompt.learners.templates import DEFAULT_TEMPLATE, TEMPLATES, split_template

SOURCE = "ProGrad's code, trainers/prograd.py and configs/trainers/ProGrad (ResNet-50)"
# Its sentences end with the name, because their words are also the start of the context.
SENTENCES = TEMPLATES | {
    "oxford_pets": "a type of pet, a photo of a {}.",
    "flowers102": "a type of flower, a photo of a {}.",
    "food101": "a type of food, a photo of {}.",
    "fgvc_aircraft": "a type of aircraft, a photo of a {}.",
    "dtd": "a texture of {}.",
}
LESS = ("flowers102", "dtd", "eurosat")
TOKENS = 16  # of a context in the published runs; those in front of the words start at zero


def _recipe(dataset: str) -> Recipe:
    text = SENTENCES[dataset]
    words = split_template(text)[0].strip()
    weight = 0.8 if dataset in LESS else 1.0
    options = {"context": words, "zeros": TOKENS - len(words.split()), "template": text, "weight": weight}
    source = f"{SOURCE}; weight 0.8 is for 8 and 16 shots, 1 for fewer" if dataset in LESS else SOURCE
    return Recipe(source=source, epochs=50 if dataset == "imagenet" else EPOCHS, options=options)


class ProGrad(CoOp):
    """ProGrad: CoOp without the part of each gradient that contradicts zero-shot CLIP (arXiv 2205.14865).

    With g the gradient of the cross-entropy and k that of the divergence from zero-shot CLIP's probabilities, a step
    follows g where <g, k> >= 0, and g - weight * <g, k> / <k, k> * k elsewhere. It needs two backward passes, which
    ``loss(scores, labels).backward()`` makes; gradients of several batches add up, each projected on its own. This
    follows the published code, except that the last word of a context with a comma, which is not trained there, is
    trained.

    Args:
        backbone: the frozen model.
        class_names: C names.
        context: words to start from, or a number of tokens with random start.
        zeros: further tokens in front of these, which start at zero; the recipes fill up to 16 with them.
        template: sentence of zero-shot CLIP, with one {} for the class name.
        weight: share of the contradicting part that is taken away; 0 is CoOp.
    """

    method: ClassVar[str] = "prograd"
    recipes: ClassVar[Mapping[str, Recipe]] = {
        "default": Recipe(source=SOURCE, epochs=EPOCHS, options={"zeros": 12}),
        **{dataset: _recipe(dataset) for dataset in SENTENCES},
    }

    def __init__(
        self,
        backbone: Backbone,
        class_names: Sequence[str],
        *,
        context: int | str = "a photo of a",
        zeros: int = 0,
        template: str = DEFAULT_TEMPLATE,
        weight: float = 1.0,
    ) -> None:
        check_backbone(backbone)
        check_weight("weight", weight)
        if not 0 <= zeros <= backbone.context_length:
            raise InputError(f"zeros: expected 0 to {backbone.context_length} tokens, got {zeros}")
        super().__init__(backbone, class_names, context=context)
        self.context = nn.Parameter(F.pad(self.context.detach(), (0, 0, zeros, 0)))  # (zeros + M, W)
        self._context_tokens += zeros
        backbone.check_fits(self._context_tokens, self.class_tokens)  # behind the longer context
        self.template, self.weight = template, weight
        self.hand_crafted(template)  # a bad template is refused here, not in the first step

    def forward(self, features: ImageFeatures) -> Scores:
        """Scores of B images: CoOp's, with parts "teacher" (B, C), zero-shot CLIP's logits, and "context" (M, W)."""
        pooled = self.backbone.accept(features).pooled
        teacher = self.backbone.logit_scale * pooled @ self.hand_crafted(self.template).T
        return Scores(super().forward(features).logits, {"teacher": teacher, "context": self.context})

    def loss(self, scores: Scores, labels: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Cross-entropy, a scalar, whose backward pass, which can be made once, leaves the projected gradient."""
        probabilities = scores.parts["teacher"].softmax(dim=-1)
        divergence = -(probabilities * scores.logits.log_softmax(dim=-1)).sum(dim=-1).mean()  # up to a constant
        terms = super().loss(scores, labels, generator=generator), divergence
        return _ProjectedGradient.apply(scores.parts["context"], terms, self.weight)


class _ProjectedGradient(torch.autograd.Function):
    """The first of two terms, with the part of its gradient taken away that contradicts that of the second."""

    @staticmethod
    def forward(ctx, context: Tensor, terms: tuple[Tensor, Tensor], weight: float) -> Tensor:  # noqa: ANN001
        ctx.context, ctx.terms, ctx.weight = context, terms, weight
        return terms[0].detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN001
        loss, divergence = ctx.terms
        with torch.enable_grad():
            (known,) = torch.autograd.grad(divergence, ctx.context, retain_graph=True)
            (wanted,) = torch.autograd.grad(loss, ctx.context)
        direction = known / known.norm().clamp(min=torch.finfo(known.dtype).tiny)
        along = (wanted * direction).sum().clamp(max=0)
        return grad * (wanted - ctx.weight * along * direction), None, None

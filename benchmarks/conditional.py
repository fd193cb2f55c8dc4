"""A training step of the methods that encode every class anew for every image: CoCoOp and CoPL."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Benchmark, Case, Shape
from benchmarks.text_encoder import NAMES
from fastprompt.backbone import ImageFeatures, load_backbone
from fastprompt.learners import CoCoOp, CoPL, Learner
from transcriptions.conditional import cocoop_context, conditional_logits, copl_context
from transcriptions.text import first_positions

# The 77-token pass keeps about 3 GB for 100 classes of one image; two images show that images do not mix.
TRANSCRIBED = 2
LEARNERS: dict[str, type[Learner]] = {learner.method: learner for learner in (CoCoOp, CoPL)}
PADDED, TRUNCATED, OURS = "77 tokens, image by image", "longest name, image by image", "fastprompt"
Step = Callable[[], tuple[Tensor, ...]]


def build(shape: Shape, device: torch.device) -> Case:
    """Ours on B images beside the image by image passes on two, with the text tower of ViT-B/16 and random weights.

    The B images are those two again and again: the logits of the first two, the mean loss and its gradients are then
    those of the two alone, while every image is computed for itself.
    """
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of random weights, which are meant here
    torch.manual_seed(0)
    backbone = load_backbone("ViT-B-16-quickgelu", "random", device=device)
    names = NAMES[shape["names"]]
    learner = LEARNERS[shape["method"]](backbone, names)
    pooled = F.normalize(torch.randn(TRANSCRIBED, backbone.embed_dim, device=device), dim=-1)
    patches = torch.randn(TRANSCRIBED, 196, backbone.patch_width, device=device)
    two, labels = ImageFeatures(pooled, patches), torch.tensor([0, len(names) - 1], device=device)
    again = torch.arange(shape["B"], device=device) % TRANSCRIBED

    ids = open_clip.SimpleTokenizer()([f"{name}." for name in names], context_length=backbone.context_length).to(device)
    needed = 1 + len(learner.context) + max(learner.class_tokens.lengths)
    padded = partial(_transcribed, learner, two, backbone.model, ids)
    truncated = partial(_transcribed, learner, two, first_positions(backbone.model, needed), ids[:, :needed])
    implementations = {
        PADDED: partial(_step, learner, padded, labels),
        TRUNCATED: partial(_step, learner, truncated, labels),
        OURS: partial(_step, learner, lambda: learner(two[again]).logits, labels[again]),
    }
    return Case(
        implementations,
        baseline=PADDED,
        truth=implementations[PADDED],
        tolerance=1e-4,  # float32 through 12 blocks; an image that reaches another one changes the first digits
        units={name: shape["B"] if name == OURS else TRANSCRIBED for name in implementations},
    )


def _step(learner: Learner, logits_of: Callable[[], Tensor], labels: Tensor) -> tuple[Tensor, ...]:
    """Logits of the first two images, loss, and gradients of all learned tensors."""
    learner.zero_grad()
    logits = logits_of()
    loss = F.cross_entropy(logits, labels)
    loss.backward()
    return logits[:TRANSCRIBED].detach(), loss.detach(), *(parameter.grad for parameter in learner.parameters())


def _transcribed(learner: Learner, features: ImageFeatures, model: nn.Module, ids: Tensor) -> Tensor:
    """Logits of a learner from its equations, with its own learned tensors."""
    context, *net = learner.parameters()
    if isinstance(learner, CoPL):
        patches = F.normalize(features.patches @ learner.backbone.model.visual.proj, dim=-1)
        contexts = [copl_context(context, net, image) for image in patches]
    else:
        contexts = [cocoop_context(context, net, image) for image in features.pooled]
    return conditional_logits(model, contexts, features.pooled, ids, learner.backbone.logit_scale)


_SHAPES = tuple(
    {"dtype": "float32", "method": method, "B": 32, "C": 100, "names": "Caltech-101"} for method in LEARNERS
)
_QUICK_SHAPES = tuple({**shape, "B": 8, "C": 47, "names": "DTD"} for shape in _SHAPES[:1])

BENCHMARK = Benchmark(
    name="conditional",
    title="Training step from cached features, times for one image (ViT-B/16 text tower, random weights)",
    build=build,
    shapes={"cpu": _SHAPES, "cuda": _SHAPES},
    quick_shapes={"cpu": _QUICK_SHAPES, "cuda": _QUICK_SHAPES},
    labels=("names",),
    implementations=(PADDED, TRUNCATED, OURS),
)

"""A whole training step of GalLoP: images, text, similarity, loss, backward pass and optimizer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import open_clip
import torch
from torch import Tensor

from benchmarks.measure import AsRounded, Benchmark, Case, Shape
from benchmarks.optional import compiled
from benchmarks.text_encoder import NAMES, PRECISIONS
from benchmarks.train_step_peers import (
    Task,
    clean_transformer,
    gallop_step,
    published_text_tower,
    published_transformer,
)
from fastprompt.backbone import Backbone, ImageFeatures, load_backbone
from fastprompt.learners import GalLoP
from transcriptions.text import first_positions

PUBLISHED, CLEAN, COMPILED = "GalLoP's code", "77 tokens", "77 tokens, torch.compile"
TRUNCATED, IMAGES, CACHED = "longest name", "fastprompt, images", "fastprompt, cached features"

Results = tuple[Tensor, ...]
MODEL = "ViT-B-16-quickgelu"
LARGEST = max(NAMES, key=lambda names: len(NAMES[names]))

# Relative error of logits, loss and gradients, from clean PyTorch in float32 on the same weights. In float32 a patch
# can be selected instead of another one because their similarities differ by rounding. In bfloat16 many are: the clean
# pass was 8e-3 away with its logits, and 2.7e-1 with the gradient of the projection.
TOLERANCE = {"float32": 1e-3, "bfloat16": AsRounded(CLEAN)}

# The settings of GalLoP's recipe but for the rate, which is 0: every call then computes the same.
SGD = partial(torch.optim.SGD, lr=0.0, momentum=0.9, weight_decay=1e-2)


@dataclass(frozen=True)
class Workload:
    """What all implementations are given.

    Attributes:
        backbone: with random weights.
        learner: whose prompts are equal in groups of ``shape["share"]``.
        task: a share of the images, and of the prompts: as many copies of each count.
        images: (B, 3, S, S), those of the task again and again.
        contexts: (G, M, W), those of the task.
    """

    backbone: Backbone
    learner: GalLoP
    task: Task
    images: Tensor
    contexts: Tensor


def workload(shape: Shape, device: torch.device) -> Workload:
    """Images, names and learned tensors, all random but the names."""
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of random weights, which are meant here
    torch.manual_seed(0)
    backbone = load_backbone(MODEL, "random", device=device, precision=PRECISIONS[shape["dtype"]])
    names, share = NAMES[shape["names"]], shape["share"]
    learner = GalLoP(backbone, names, context=4)
    contexts = torch.cat([learner.global_prompts, learner.local_prompts]).detach()[::share]
    with torch.no_grad():
        for learned, some in zip((learner.global_prompts, learner.local_prompts), contexts.chunk(2), strict=True):
            learned.copy_(some.repeat_interleave(share, dim=0))
        learner.local_projection.add_(0.01 * torch.randn_like(learner.local_projection))
    images = torch.randn(shape["B"] // share, 3, backbone.image_size, backbone.image_size, device=device)
    ids = open_clip.SimpleTokenizer()(list(names), context_length=backbone.context_length).to(device)
    labels = torch.randint(len(names), (len(images),), device=device)
    task = Task(images, labels, learner.draw_prompts(len(images)), ids, learner.k, backbone.logit_scale, share)
    return Workload(backbone, learner, task, images.repeat(share, 1, 1, 1), contexts)


def build(shape: Shape, device: torch.device) -> Case:
    """Ours on B images and 8 prompts beside peers that do a share of that, with ViT-B/16 and random weights.

    With a share of 4 the peers take a fourth of the images and of the prompts through the towers, and their time is
    multiplied by 4. Ours takes these images and prompts four times, each computed for itself: logits, loss and
    gradients are those of the peers.
    """
    torch.compiler.reset()
    work = workload(shape, device)
    model, task = work.backbone.model, work.task
    needed = 1 + work.contexts.shape[1] + max(work.learner.class_tokens.lengths)
    cut = replace(task, ids=task.ids[:, :needed])
    published = partial(gallop_step, published_text_tower(model), model.visual, published_transformer, task=task)
    clean = partial(gallop_step, model, model.visual, clean_transformer, task=task)
    truncated = partial(gallop_step, first_positions(model, needed), model.visual, clean_transformer, task=cut)
    peers = {PUBLISHED: published, CLEAN: clean, COMPILED: compiled(clean), TRUNCATED: truncated}
    with torch.no_grad():
        features = work.backbone.encode_images(work.images)

    def truth() -> Results:
        exact = deepcopy(model).float()  # the same weights, whatever the precision of the others
        # 1000 names of 77 tokens take 38 GB for each prompt.
        return _padded(work, partial(gallop_step, exact, exact.visual, clean_transformer, task=task, again=True))()

    return Case(
        {
            **{name: _padded(work, forward) for name, forward in peers.items()},
            IMAGES: _ours(work, lambda: work.backbone.encode_images(work.images)),
            CACHED: _ours(work, lambda: features),
        },
        baseline=PUBLISHED,
        truth=truth,
        tolerance=TOLERANCE[shape["dtype"]],
        shares=dict.fromkeys(peers, shape["share"]),
    )


def _padded(work: Workload, forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[], Results]:
    """A step of a peer: logits, loss, and gradients of contexts and projection."""
    contexts, projection = (x.detach().clone().requires_grad_() for x in (work.contexts, work.learner.local_projection))
    optimizer = SGD([contexts, projection])

    def step() -> Results:
        optimizer.zero_grad()
        logits, loss = forward(contexts, projection)
        loss.backward()
        optimizer.step()
        return logits.detach(), loss.detach()[None], contexts.grad, projection.grad

    return step


def _ours(work: Workload, features: Callable[[], ImageFeatures]) -> Callable[[], Results]:
    """Our step, with the results of a peer's: those of the first images, and sums over prompts that are equal."""
    learner, task = work.learner, work.task
    optimizer, labels = SGD(learner.parameters()), task.labels.repeat(task.copies)
    drawn = task.drawn.repeat(task.copies, 1)
    learner.draw_prompts = lambda images, generator: drawn  # those of the peers

    def step() -> Results:
        with torch.no_grad():
            images = features()
        scores = learner(images)
        loss = learner.loss(scores, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        of_contexts = torch.cat([learner.global_prompts.grad, learner.local_prompts.grad])
        of_contexts = of_contexts.unflatten(0, (-1, task.copies)).sum(dim=1)
        return (
            scores.logits[: len(task.images)].detach(),
            loss.detach()[None],
            of_contexts,
            learner.local_projection.grad,
        )

    return step


_CPU = {"dtype": "float32", "B": 8, "C": 47, "names": "DTD", "share": 4}
_GPU = {"dtype": "bfloat16", "B": 128, "C": len(NAMES[LARGEST]), "names": LARGEST, "share": 4}
_CPU_SHAPES = (_CPU, {**_CPU, "B": 32}, {**_CPU, "dtype": "bfloat16"})
_GPU_SHAPES = tuple({**_GPU, "B": images} for images in (128, 512, 2048))

PROFILED = {
    "cpu": tuple({**_CPU, "dtype": dtype} for dtype in PRECISIONS),
    "cuda": _GPU_SHAPES[:1],
}

BENCHMARK = Benchmark(
    name="train_step",
    title="A training step of GalLoP with 8 prompts (ViT-B/16, random weights)",
    build=build,
    shapes={"cpu": _CPU_SHAPES, "cuda": _GPU_SHAPES},
    quick_shapes={"cpu": _CPU_SHAPES[:1], "cuda": _GPU_SHAPES[:1]},
    sweeps=("B",),
    labels=("names",),
    implementations=(PUBLISHED, CLEAN, COMPILED, TRUNCATED, IMAGES, CACHED),
)

"""The text tower at 8 contexts and 1000 names, forward and backward, beside passes of 77 tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import text_encoder
from benchmarks.gpu.cases import Rows, Timed
from benchmarks.gpu.clock import time_calls
from benchmarks.gpu.plan import Plan
from benchmarks.gpu.small import FEW, use_small_models
from fastprompt.backbone import Backbone, ClassTokens, load_backbone

IMAGENET = max(text_encoder.NAMES, key=lambda names: len(text_encoder.NAMES[names]))


def items(plan: Plan) -> dict[str, Rows]:
    """Ours with and without replays, then peers."""
    use_small_models(plan)
    names = FEW if plan.rehearse else IMAGENET
    classes, groups = len(text_encoder.NAMES[names]), 2 if plan.rehearse else 8
    shape = {"dtype": "bfloat16", "G": groups, "M": 4, "C": classes, "names": names, "sequences": min(100, classes)}
    chosen = [text_encoder.OURS, text_encoder.PADDED, text_encoder.TRUNCATED, text_encoder.XFORMERS]
    found = {"replays": partial(_replays, plan, groups, names)}
    return found | Timed("text_encoder", text_encoder.build, shape, tuple(chosen[: 1 if plan.quick else 4])).items(plan)


def _replays(plan: Plan, groups: int, names: str) -> Iterator[dict]:
    """Features and gradients with and without CUDA graphs, their times, and the tokens that are encoded."""
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of random weights, which are meant here
    device, backbones = torch.device(plan.device), {}
    for graphs in (False, True):
        torch.manual_seed(0)
        backbones[graphs] = load_backbone(
            text_encoder.MODEL, "random", device=device, precision="bf16", cuda_graphs=graphs
        )
    backbone = backbones[True]
    contexts = 0.02 * torch.randn(2, groups, 4, backbone.text_width, device=device)
    # The class tokens are the same object at every pass, as a learner has them.
    passes = {graphs: partial(_pass, one, one.tokenize(text_encoder.NAMES[names])) for graphs, one in backbones.items()}
    for number in range(3):  # the first is recorded; all are replayed
        context = contexts[number % 2]
        launched, replayed = (passes[graphs](context) for graphs in (False, True))
        errors = [((a - b).norm() / a.norm()).item() for a, b in zip(launched, replayed, strict=True)]
        same = all(map(torch.equal, launched, replayed))
        yield {"pass": number, "same_bits": same, "error": max(errors), "right": max(errors) <= 1e-2}
    class_tokens = backbone.tokenize(text_encoder.NAMES[names])
    tokens = groups * (1 + 4 + sum(class_tokens.lengths))
    for graphs, run in passes.items():
        times = time_calls([partial(run, contexts[0])], device, plan.seconds, graphs=not graphs)
        recordings = len(backbones[graphs]._prompts.replays._recordings)
        yield {"replays": graphs, "recordings": recordings, "tokens": tokens, "width": backbone.text_width, **times}


def _pass(backbone: Backbone, class_tokens: ClassTokens, context: Tensor) -> tuple[Tensor, Tensor]:
    """Features and the gradient of the contexts."""
    leaf = context.detach().requires_grad_()
    features = backbone.encode_prompts(leaf, class_tokens).float()
    features.square().mul(torch.linspace(-1, 1, features.shape[-1], device=features.device)).sum().backward()
    return features.detach(), leaf.grad

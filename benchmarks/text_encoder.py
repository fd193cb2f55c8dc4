"""Text features of class names behind learned contexts, forward and backward to the contexts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import open_clip
import torch
from torch import Tensor

from benchmarks.class_names import CALTECH, DTD
from benchmarks.measure import Benchmark, Case, Shape
from benchmarks.optional import compiled
from benchmarks.peers import encode_padded, first_positions
from fastprompt.backbone import load_backbone

INVENTED = tuple(f"{name} {kind}" for kind in ("drawing", "photo", "toy") for name in (*CALTECH, *DTD))
NAMES = {
    "DTD": DTD,
    "Caltech-101": CALTECH,
    "DTD + Caltech-101 + 250 invented": (*DTD, *CALTECH, *INVENTED[:250]),
}
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}

PADDED, COMPILED, TRUNCATED, OURS = "77 tokens", "77 tokens, torch.compile", "longest name", "fastprompt"

# Relative error of features and gradients through 12 blocks; a token too many or too few changes the first digits.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}


def build(shape: Shape, device: torch.device) -> Case:
    """Ours beside the padded passes, with the text tower of ViT-B/16 and random weights.

    The padded passes encode the first prompt alone, and count G times: they take the same arithmetic prompt by prompt,
    and G of them at once take minutes, and G times the memory.
    """
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of random weights, which are meant here
    torch.manual_seed(0)
    torch.compiler.reset()
    backbone = load_backbone("ViT-B-16-quickgelu", "random", device=device, precision=PRECISIONS[shape["dtype"]])
    names, model = NAMES[shape["names"]], backbone.model
    class_tokens = backbone.tokenize(names)
    ids = open_clip.SimpleTokenizer()(list(names), context_length=backbone.context_length).to(device)
    context = 0.02 * torch.randn(shape["G"], shape["M"], backbone.text_width, device=device)
    weights = torch.randn(shape["G"], shape["C"], backbone.embed_dim, device=device)
    needed = 1 + shape["M"] + max(class_tokens.lengths)
    padded = partial(encode_padded, model, ids=ids)
    truncated = partial(encode_padded, first_positions(model, needed), ids=ids[:, :needed])

    def forward_backward(encode: Callable[[Tensor], Tensor], prompts: int) -> tuple[Tensor, Tensor]:
        leaf = context[:prompts].detach().requires_grad_()
        features = encode(leaf).float()
        (features * weights[:prompts]).sum().backward()
        return features.detach(), leaf.grad

    def one(encode: Callable[[Tensor], Tensor]) -> partial:
        return partial(forward_backward, lambda leaf: encode(leaf.to(backbone.dtype)), prompts=1)

    ours = partial(backbone.encode_prompts, class_tokens=class_tokens)
    return Case(
        {
            PADDED: one(padded),
            COMPILED: one(compiled(padded)),
            TRUNCATED: one(truncated),
            OURS: partial(forward_backward, ours, prompts=shape["G"]),
        },
        baseline=PADDED,
        truth=one(padded),
        tolerance=TOLERANCE[shape["dtype"]],
        shares=dict.fromkeys((PADDED, COMPILED, TRUNCATED), shape["G"]),
    )


_SHAPES = tuple(
    {"dtype": dtype, "G": 8, "M": 4, "C": len(names), "names": label}
    for dtype in PRECISIONS
    for label, names in NAMES.items()
)

BENCHMARK = Benchmark(
    name="text_encoder",
    title="Text features, forward and backward to the contexts (ViT-B/16 text tower, random weights)",
    build=build,
    shapes={"cpu": _SHAPES, "cuda": _SHAPES},
    quick_shapes={"cpu": _SHAPES[:1], "cuda": _SHAPES[:1]},
    sweeps=("C",),
    labels=("names",),
    implementations=(PADDED, COMPILED, TRUNCATED, OURS),
)

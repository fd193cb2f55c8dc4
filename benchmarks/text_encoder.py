"""Text features of class names behind learned contexts, forward and backward to the contexts."""

from __future__ import annotations

import logging
from functools import partial
from types import SimpleNamespace

import open_clip
import torch
from torch import Tensor

from benchmarks.class_names import CALTECH, DTD
from benchmarks.measure import Benchmark, Case, Shape
from benchmarks.peers import encode_padded
from fastprompt.backbone import load_backbone

NAMES = {
    "DTD": DTD,
    "Caltech-101": CALTECH,
    "DTD + Caltech-101 + 53 invented": (*DTD, *CALTECH, *(f"{name} drawing" for name in CALTECH[:53])),
}

PADDED, PROMPT_BY_PROMPT, TRUNCATED, OURS = "77 tokens", "77 tokens, prompt by prompt", "longest name", "fastprompt"

# A padded token costs about 0.5 MB until the backward pass: 40,000 of them 20 GB. Where there are more, the padded pass
# encodes one prompt at a time, which takes the same arithmetic in a fourth of the memory.
TOKENS_AT_ONCE = 40_000


def build(shape: Shape, device: torch.device) -> Case:
    """Ours beside the padded passes, with the text tower of ViT-B/16 and random weights."""
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of random weights, which are meant here
    torch.manual_seed(0)
    backbone = load_backbone("ViT-B-16-quickgelu", "random", device=device)
    names, model = NAMES[shape["names"]], backbone.model
    class_tokens = backbone.tokenize(names)
    ids = open_clip.SimpleTokenizer()(list(names), context_length=backbone.context_length).to(device)
    context = 0.02 * torch.randn(shape["G"], shape["M"], backbone.text_width, device=device)
    weights = torch.randn(shape["G"], shape["C"], backbone.embed_dim, device=device)
    needed = 1 + shape["M"] + max(class_tokens.lengths)
    padded = partial(encode_padded, model, ids=ids)
    truncated = partial(encode_padded, _first_positions(model, needed), ids=ids[:, :needed])
    ours = partial(backbone.encode_prompts, class_tokens=class_tokens)

    def forward_backward(encode: partial, prompts_at_once: int = shape["G"]) -> tuple[Tensor, Tensor]:
        leaf = context.detach().requires_grad_()
        parts = []
        for part, weight in zip(leaf.split(prompts_at_once), weights.split(prompts_at_once), strict=True):
            features = encode(part)
            (features * weight).sum().backward()
            parts.append(features.detach())
        return torch.cat(parts), leaf.grad

    if shape["G"] * ids.numel() <= TOKENS_AT_ONCE:
        baseline, pad = PADDED, partial(forward_backward, padded)
    else:
        baseline, pad = PROMPT_BY_PROMPT, partial(forward_backward, padded, prompts_at_once=1)
    return Case(
        {
            baseline: pad,
            TRUNCATED: partial(forward_backward, truncated),
            OURS: partial(forward_backward, ours),
        },
        baseline=baseline,
        truth=pad,
        tolerance=1e-4,  # float32 through 12 blocks; a token too many or too few changes the first digits
    )


def _first_positions(model: torch.nn.Module, length: int) -> SimpleNamespace:
    """The text tower of an open_clip model that reads ``length`` tokens: exact, because it is causal."""
    return SimpleNamespace(
        token_embedding=model.token_embedding,
        positional_embedding=model.positional_embedding[:length],
        attn_mask=model.attn_mask[:length, :length],
        transformer=model.transformer,
        ln_final=model.ln_final,
        text_projection=model.text_projection,
    )


_SHAPES = tuple({"dtype": "float32", "G": 4, "M": 4, "C": len(names), "names": label} for label, names in NAMES.items())

BENCHMARK = Benchmark(
    name="text_encoder",
    title="Text features, forward and backward to the contexts (ViT-B/16 text tower, random weights)",
    build=build,
    shapes={"cpu": _SHAPES, "cuda": _SHAPES},
    quick_shapes={"cpu": _SHAPES[:2], "cuda": _SHAPES[:2]},
    sweeps=("C",),
    labels=("names",),
    implementations=(PADDED, PROMPT_BY_PROMPT, TRUNCATED, OURS),
)

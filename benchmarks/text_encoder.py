"""Text features of class names behind learned contexts, forward and backward to the contexts."""

from __future__ import annotations

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

IMPLEMENTATIONS = ("77 tokens", "longest name", "fastprompt")


def build(shape: Shape, device: torch.device) -> Case:
    """Ours beside the padded passes, with the text tower of ViT-B/16 and random weights."""
    torch.manual_seed(0)
    backbone = load_backbone("ViT-B-16-quickgelu", "random", device=device)
    names, model = NAMES[shape["names"]], backbone.model
    class_tokens = backbone.tokenize(names)
    ids = open_clip.SimpleTokenizer()(list(names), context_length=backbone.context_length).to(device)
    context = 0.02 * torch.randn(shape["G"], shape["M"], backbone.text_width, device=device)
    weights = torch.randn(shape["G"], shape["C"], backbone.embed_dim, device=device)
    needed = 1 + shape["M"] + max(class_tokens.lengths)
    encoders = (
        partial(encode_padded, model, ids=ids),
        partial(encode_padded, _first_positions(model, needed), ids=ids[:, :needed]),
        partial(backbone.encode_prompts, class_tokens=class_tokens),
    )

    def forward_backward(encode: partial) -> tuple[Tensor, Tensor]:
        leaf = context.clone().requires_grad_()
        features = encode(leaf)
        (features * weights).sum().backward()
        return features.detach(), leaf.grad

    return Case(
        {name: partial(forward_backward, encode) for name, encode in zip(IMPLEMENTATIONS, encoders, strict=True)},
        baseline=IMPLEMENTATIONS[0],
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


_SHAPES = tuple({"G": 4, "M": 4, "C": len(names), "names": label} for label, names in NAMES.items())

BENCHMARK = Benchmark(
    name="text_encoder",
    title="Text features, forward and backward to the contexts (ViT-B/16 text tower, random weights)",
    dtype="float32",
    build=build,
    shapes=_SHAPES,
    quick_shapes=_SHAPES[:2],
    panels=("G", "M"),
)

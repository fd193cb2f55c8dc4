"""The layers of fastprompt.layers beside what they take the place of, forward and backward to what is learned."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from open_clip import SimpleTokenizer
from torch import Tensor

from benchmarks.class_names import CALTECH
from benchmarks.measure import Benchmark, Case, Implementation, Shape
from fastprompt.backbone import load_backbone
from fastprompt.layers import SharedPrefixTextEncoder, TopKLocalHead
from transcriptions.drop_in import coop_prompts, dense_local_logits, gallop_text, text_encoder, topk_reduce

TEXT_COOP, TEXT_GALLOP, LOCAL = "text (CoOp)", "text (GalLoP)", "local"
REPLACED, OURS = "replaced", "fastprompt"
K = (5, 10, 15, 20)


def build(shape: Shape, device: torch.device) -> Case:
    """One layer and its peer, at the sizes of ViT-B/16 with random weights."""
    torch.manual_seed(0)
    if shape["layer"] == LOCAL:
        return _local(shape, device)
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of random weights, which are meant here
    model = load_backbone("ViT-B-16-quickgelu", "random", device=device).model
    names, layer = CALTECH[: shape["C"]], SharedPrefixTextEncoder(model)
    context = 0.02 * torch.randn(shape["n"], 4, 512, device=device)
    if shape["layer"] == TEXT_COOP:
        ids = SimpleTokenizer()([f"X X X X {name}." for name in names], context_length=77).to(device)
        return _case(
            lambda learned: text_encoder(model, coop_prompts(model, learned[0], ids), ids),
            lambda learned: layer(coop_prompts(model, learned[0], ids), ids),
            (context,),
        )
    ids = SimpleTokenizer()(list(names), context_length=77).to(device)
    return _case(
        lambda learned: gallop_text(model, learned, ids), lambda learned: layer.encode(learned, ids), (context,)
    )


def _local(shape: Shape, device: torch.device) -> Case:
    features = torch.randn(shape["B"], 196, 768, device=device)
    visual_proj = torch.randn(768, 512, device=device) / 768**0.5
    text = F.normalize(torch.randn(shape["C"], shape["n"], 512, device=device), dim=-1)
    local_proj, head = torch.eye(768, device=device), TopKLocalHead(K)

    def dense(projection: Tensor, text: Tensor) -> Tensor:
        return topk_reduce(dense_local_logits(features, lambda x: F.linear(x, projection), visual_proj, text), K)

    def ours(projection: Tensor, text: Tensor) -> Tensor:
        return head(features, text, projection.T @ visual_proj)

    return _case(dense, ours, (local_proj, text))


def _case(theirs: Callable[..., Tensor], ours: Callable[..., Tensor], learned: Sequence[Tensor]) -> Case:
    """Results and gradients of both; the gradient that comes in is the same."""
    with torch.no_grad():
        grad = torch.randn_like(ours(*learned))

    def run(function: Callable[..., Tensor]) -> Implementation:
        def forward_backward() -> tuple[Tensor, ...]:
            leaves = [tensor.detach().requires_grad_() for tensor in learned]
            result = function(*leaves)
            result.backward(grad)
            return *(leaf.grad for leaf in leaves), result.detach()

        return forward_backward

    # Where two patches are equally similar to rounding, either may be selected: that is most of this tolerance.
    return Case({REPLACED: run(theirs), OURS: run(ours)}, REPLACED, run(theirs), tolerance=1e-3)


_SHAPES = (
    {"dtype": "float32", "layer": TEXT_COOP, "B": 0, "C": 47, "n": 1},
    {"dtype": "float32", "layer": TEXT_GALLOP, "B": 0, "C": 47, "n": 4},
    # GalLoP's classes on ImageNet, in batches of its training and of its evaluation.
    {"dtype": "float32", "layer": LOCAL, "B": 128, "C": 1000, "n": 4},
    {"dtype": "float32", "layer": LOCAL, "B": 256, "C": 1000, "n": 4},
)

BENCHMARK = Benchmark(
    name="drop_in",
    title="Layers for existing code beside what they replace, forward and backward (sizes of ViT-B/16)",
    build=build,
    shapes={"cpu": _SHAPES, "cuda": _SHAPES},
    quick_shapes={"cpu": _SHAPES, "cuda": _SHAPES},
    implementations=(REPLACED, OURS),
)

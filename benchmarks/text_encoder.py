"""Text features of class names behind learned contexts, forward and backward to the contexts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy
from functools import partial

import open_clip
import torch
from torch import Tensor, nn

from benchmarks.class_names import CALTECH, DTD
from benchmarks.measure import AsRounded, Benchmark, Case, Shape
from benchmarks.optional import by_xformers, compiled
from fastprompt.backbone import load_backbone
from transcriptions.text import encode_padded, first_positions

KINDS = ("drawing", "photo", "toy", "painting", "statue", "model")
INVENTED = tuple(f"{name} {kind}" for kind in KINDS for name in (*CALTECH, *DTD))
NAMES = {
    "DTD": DTD,
    "Caltech-101": CALTECH,
    "DTD + Caltech-101 + 250 invented": (*DTD, *CALTECH, *INVENTED[:250]),
    "DTD + Caltech-101 + 853 invented": (*DTD, *CALTECH, *INVENTED[:853]),  # as many as ImageNet has
}
MODEL = "ViT-B-16-quickgelu"
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}

PADDED, COMPILED, TRUNCATED, OURS = "77 tokens", "77 tokens, torch.compile", "longest name", "fastprompt"
XFORMERS = "fastprompt, xformers"

# Relative error of features and gradients through 12 blocks; a token too many or too few changes the first digits.
TOLERANCE = {"float32": 1e-4, "bfloat16": AsRounded(PADDED)}

Encode = Callable[[Tensor], Tensor]  # contexts (G, M, W) to features (G, classes, D)


def build(shape: Shape, device: torch.device) -> Case:
    """Ours beside the padded passes, with the text tower of ViT-B/16 and random weights.

    The padded passes encode prompt by prompt and keep all graphs until the backward pass, as GalLoP's code does without
    checkpoints. Of their G * C sequences they encode ``shape["sequences"]``: all of them, or the first names behind the
    first prompt.
    """
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of random weights, which are meant here
    torch.manual_seed(0)
    torch.compiler.reset()
    backbone = load_backbone(MODEL, "random", device=device, precision=PRECISIONS[shape["dtype"]])
    names, model = NAMES[shape["names"]], backbone.model
    class_tokens = backbone.tokenize(names)
    ids = open_clip.SimpleTokenizer()(list(names), context_length=backbone.context_length).to(device)
    context = 0.02 * torch.randn(shape["G"], shape["M"], backbone.text_width, device=device)
    weights = torch.randn(shape["G"], shape["C"], backbone.embed_dim, device=device)
    prompts, classes = max(shape["sequences"] // shape["C"], 1), min(shape["sequences"], shape["C"])
    needed = 1 + shape["M"] + max(class_tokens.lengths)

    def exact(length: int, prompts: int, classes: int) -> tuple[Tensor, Tensor]:
        encode = _padded(deepcopy(model).float(), ids[:classes, :length])  # the same weights in float32
        alone = ((context[g, None], weights[g, None, :classes]) for g in range(prompts))  # one graph at a time
        return tuple(map(torch.cat, zip(*(_forward_backward(encode, *one) for one in alone), strict=True)))

    def peer(encode: Encode) -> partial:
        in_turn = _in_turn(lambda contexts: encode(contexts.to(backbone.dtype)))
        return partial(_forward_backward, in_turn, context[:prompts], weights[:prompts, :classes])

    padded = _padded(model, ids[:classes])
    peers = {
        PADDED: peer(padded),
        COMPILED: peer(compiled(padded)),
        TRUNCATED: peer(_padded(model, ids[:classes, :needed])),
    }
    ours = partial(_forward_backward, partial(backbone.encode_prompts, class_tokens=class_tokens), context, weights)
    share = shape["G"] * shape["C"] / shape["sequences"]
    return Case(
        {**peers, OURS: ours, XFORMERS: by_xformers(ours)},
        baseline=PADDED,
        truth=partial(exact, needed, shape["G"], shape["C"]),
        truth_of_shares=partial(exact, backbone.context_length, prompts, classes),
        tolerance=TOLERANCE[shape["dtype"]],
        shares={} if share == 1 else dict.fromkeys(peers, share),
    )


def _padded(model: nn.Module, ids: Tensor) -> Encode:
    """All names at once behind contexts, at the length of the ids (C, L)."""
    return partial(encode_padded, first_positions(model, ids.shape[1]), ids=ids)


def _in_turn(encode: Encode) -> Encode:
    return lambda contexts: torch.cat([encode(one[None]) for one in contexts])


def _forward_backward(encode: Encode, context: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Features and the gradient of the contexts."""
    leaf = context.detach().requires_grad_()
    features = encode(leaf).float()
    (features * weights).sum().backward()
    return features.detach(), leaf.grad


def all_sequences(label: str, prompts: int) -> dict[str, int | str]:
    """The shape in which all implementations do the whole work."""
    classes = len(NAMES[label])
    return {"dtype": "float32", "G": prompts, "M": 4, "C": classes, "names": label, "sequences": prompts * classes}


# 100 of the 397 names stand for them in the padded passes, in favour of these: one over all 397 at once took 1.8 times
# as long a sequence on two cores. In bfloat16 on a CPU one list of names is enough to see what it does.
_SHAPES = tuple({**all_sequences(label, 8), "sequences": min(len(names), 100)} for label, names in NAMES.items())
_LOW_SHAPES = tuple({**shape, "dtype": "bfloat16"} for shape in _SHAPES)

BENCHMARK = Benchmark(
    name="text_encoder",
    title="Text features, forward and backward to the contexts (ViT-B/16 text tower, random weights)",
    build=build,
    shapes={"cpu": (*_SHAPES[:3], _LOW_SHAPES[0]), "cuda": (*_SHAPES, *_LOW_SHAPES)},
    quick_shapes={"cpu": _SHAPES[:1], "cuda": (_SHAPES[0], _LOW_SHAPES[0])},  # its attention takes no float32 there
    sweeps=("C",),
    labels=("names", "sequences"),
    implementations=(PADDED, COMPILED, TRUNCATED, OURS, XFORMERS),
)

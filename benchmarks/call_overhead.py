"""What one call costs before any arithmetic: tiny tensors through the registered operators and through plain torch."""

from __future__ import annotations

from functools import partial

import torch
from fastprompt_kernels import topk_similarity
from fastprompt_kernels.topk_similarity import reference

from benchmarks import similarity
from benchmarks.measure import Benchmark, Case, Shape

K = 2


def definition(patches: torch.Tensor, prompts: torch.Tensor) -> tuple[torch.Tensor]:
    """The formula in plain torch, without any check."""
    return (reference.topk_similarity(patches, prompts, [[K]] * len(prompts)),)


def public(impl: str, patches: torch.Tensor, prompts: torch.Tensor) -> tuple[torch.Tensor]:
    """An implementation through the checks of the public function."""
    return (topk_similarity(patches, prompts, K, impl=impl),)


FUNCTIONS = {
    "definition": definition,
    "impl='reference'": partial(public, "reference"),
    "impl='auto'": partial(public, "auto"),
    "impl='blocked'": partial(public, "blocked"),
}
ON_CPU = "impl='blocked'"


def build(shape: Shape, device: torch.device) -> Case:
    """The definition called directly, the same through the checks of the public function, and the operators."""
    patches, prompts, random = similarity.draw(shape, device)
    grads = [random(shape["B"], shape["N"], shape["C"])] if shape["pass"] == similarity.TRAINING else None
    chosen = {name: function for name, function in FUNCTIONS.items() if device.type == "cpu" or name != ON_CPU}
    return Case(
        {name: similarity.run(function, patches, prompts, grads) for name, function in chosen.items()},
        baseline="definition",
        truth=similarity.truth(definition, patches, prompts, grads),
        tolerance=similarity.TOLERANCE[shape["dtype"]],
        calls=100,
    )


_TINY = {"dtype": "float32", "pass": "", "B": 1, "P": 4, "N": 1, "D": 4, "C": 2}
_SHAPES = similarity.around(_TINY, {})

BENCHMARK = Benchmark(
    name="call_overhead",
    title="One call of topk_similarity on tiny tensors",
    build=build,
    shapes={"cpu": _SHAPES, "cuda": _SHAPES},
    quick_shapes={"cpu": _SHAPES, "cuda": _SHAPES},
    implementations=tuple(FUNCTIONS),
)

"""What each patch says of all classes: GL-MCM's score, and maximum, log-sum-exp and entropy with gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from fastprompt_kernels import patch_statistics
from fastprompt_kernels.patch_statistics import reference
from torch import Tensor

from benchmarks import similarity
from benchmarks.measure import Benchmark, Case, Shape
from benchmarks.optional import compiled

SCALE = 100.0  # CLIP's temperature, which LoCoOp's entropy uses; GL-MCM uses 1

# (patches, prompts) to results of shape (B, P)
Statistics = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def score_dense(patches: Tensor, prompts: Tensor) -> tuple[Tensor]:
    """The largest softmax probability of every patch, as GL-MCM's code computes it: the whole softmax in float32."""
    return ((patches @ prompts.T).float().softmax(dim=-1).amax(dim=-1),)


def score_best(patches: Tensor, prompts: Tensor) -> tuple[Tensor]:
    """The best eager rewrite found: one exponential in place; cosines are at most 1, so none overflows.

    Also tried: maximum and log-sum-exp, the maximum subtracted in place, some images at a time.
    """
    exponentials = (patches @ prompts.T).float().exp_()
    return (exponentials.amax(dim=-1) / exponentials.sum(dim=-1),)


def score_fastprompt(patches: Tensor, prompts: Tensor, impl: str = "auto") -> tuple[Tensor]:
    """The same from patch_statistics, without the entropy."""
    statistics = patch_statistics(patches, prompts, entropy=False, impl=impl)
    return ((statistics.maximum - statistics.logsumexp).exp(),)


def statistics_dense(patches: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Maximum, log-sum-exp and entropy by their definitions."""
    logits = SCALE * (patches @ prompts.T).float()
    probabilities = logits.softmax(dim=-1)
    return logits.amax(dim=-1), logits.logsumexp(dim=-1), -(probabilities * probabilities.log()).sum(dim=-1)


def statistics_best(patches: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best eager rewrite found: log-sum-exp and entropy from one softmax, and no logarithm of a dense tensor.

    Also tried: log_softmax, logsumexp beside softmax, amax, max, a scale on patches or prompts, some images at a time.
    """
    logits = SCALE * (patches @ prompts.T).float()
    probabilities, best = logits.softmax(dim=-1), logits.argmax(dim=-1, keepdim=True)
    maximum = logits.gather(-1, best)[..., 0]
    logsumexp = maximum - probabilities.gather(-1, best)[..., 0].log()
    return maximum, logsumexp, logsumexp - torch.linalg.vecdot(probabilities, logits)


def statistics_fastprompt(patches: Tensor, prompts: Tensor, impl: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """The same from patch_statistics."""
    return patch_statistics(patches, prompts, scale=SCALE, impl=impl)[:3]


def score_exact(patches: Tensor, prompts: Tensor) -> tuple[Tensor]:
    """The definition of the score, in the dtype of the inputs."""
    return ((patches @ prompts.T).softmax(dim=-1).amax(dim=-1),)


def statistics_exact(patches: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of the statistics, which is the oracle of the kernels' tests."""
    return reference.patch_statistics(patches, prompts, SCALE, None)[:3]


def build(shape: Shape, device: torch.device) -> Case:
    """``impl="auto"`` beside its peers: the score for inference, all three statistics with gradients."""
    torch.compiler.reset()
    return case(shape, device, peers(shape["pass"]))


def peers(direction: str) -> dict[str, Statistics]:
    """What the field runs today, by name, for one pass."""
    dense, best, ours = computations(direction)
    return {
        "dense eager": dense,
        "best eager": best,
        "fastprompt": ours,
        "dense compiled": compiled(dense),
        "best compiled": compiled(best),
    }


def computations(direction: str) -> tuple[Statistics, Statistics, Statistics]:
    """What a pass computes: as the field does, by the best eager code, and by fastprompt."""
    if direction == similarity.TRAINING:
        return statistics_dense, statistics_best, statistics_fastprompt
    return score_dense, score_best, score_fastprompt


def case(shape: Shape, device: torch.device, chosen: Mapping[str, Statistics]) -> Case:
    """Some implementations beside each other, on random unit vectors. The first is the baseline."""
    patches, prompts, random = similarity.draw({**shape, "N": 1}, device)
    prompts, grads = prompts[0], None
    if shape["pass"] == similarity.TRAINING:
        grads = [random(shape["B"], shape["P"]) for _ in range(3)]
        top = (patches.float() @ prompts.float().T).topk(2).values
        # Of two classes that rounding alone sets apart, either may get the gradient of the maximum.
        grads[0] *= top[..., 0] - top[..., 1] > similarity.ROUNDING[shape["dtype"]]
    exact = score_exact if grads is None else statistics_exact
    return Case(
        {name: similarity.run(function, patches, prompts, grads) for name, function in chosen.items()},
        baseline=next(iter(chosen)),
        truth=similarity.truth(exact, patches, prompts, grads),
        tolerance=similarity.TOLERANCE[shape["dtype"]],
        floors=similarity.floors(
            shape, patches, prompts, patches[..., 0].numel() * (1 if grads is None else len(grads))
        ),
    )


_CPU = {"dtype": "float32", "pass": "", "B": 32, "P": 196, "D": 512, "C": 397}
_GPU = {**_CPU, "dtype": "bfloat16", "B": 128, "C": 1000}

BENCHMARK = Benchmark(
    name="patch_statistics",
    title="Statistics of every patch over the classes; forward: GL-MCM's score; backward: maximum, lse and entropy",
    build=build,
    shapes={
        "cpu": similarity.around(_CPU, {"C": (47, 1000), "B": (8, 64), "P": (49, 576)}),
        "cuda": similarity.around(_GPU, {"C": (100, 397, 4000), "B": (8, 32, 512, 2048), "P": (49, 576, 1024)}),
    },
    quick_shapes={
        "cpu": similarity.around({**_CPU, "C": 47}, {}),
        "cuda": similarity.around(_GPU, {}),
    },
    sweeps=("B", "C", "P"),
    implementations=tuple(peers(similarity.FORWARD)),
)

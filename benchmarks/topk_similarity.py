"""GalLoP's local similarity: the mean of the k largest patch similarities of every prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from fastprompt_kernels import topk_similarity
from fastprompt_kernels.topk_similarity import reference
from torch import Tensor

from benchmarks import similarity
from benchmarks.measure import Benchmark, Case, Shape
from benchmarks.optional import compiled, topk_mean_keops
from transcriptions.gallop import topk_mean_dense

# (patches, prompts, k of every prompt) to (B, N, C)
Similarity = Callable[[Tensor, Tensor, Sequence[int]], Tensor]

# KeOps has no matrix product. On a CPU that takes so long with 47 classes that more are not waited for.
KEOPS_CLASSES_ON_CPU = 47


def topk_mean_best(patches: Tensor, prompts: Tensor, k: Sequence[int]) -> Tensor:
    """The best eager rewrite found: one matrix product, patches last so that top-k reads contiguous rows, unsorted.

    Also tried: a product for each prompt, one top-k for all prompts and its sorted front, masks from the k-th value,
    sorting, and sums of the selected patches by ``embedding_bag``. Arguments and result as ``topk_mean_dense``.
    """
    N, C, _ = prompts.shape
    queries, parts = prompts.flatten(0, 1), []
    for images in _chunks(patches, N * C * patches.shape[1] * patches.element_size()):
        dense = (queries @ images.flatten(0, 1).T).view(N, C, *images.shape[:2])
        pairs = zip(dense.unbind(), k, strict=True)
        parts.append(torch.stack([rows.topk(count, sorted=False).values.mean(-1) for rows, count in pairs]))
    return torch.cat(parts, dim=2).permute(2, 0, 1)


def peers() -> dict[str, Similarity]:
    """What the field runs today, by name."""
    return {
        "GalLoP eager": topk_mean_dense,
        "best eager": topk_mean_best,
        "fastprompt": topk_similarity,
        "GalLoP compiled": compiled(topk_mean_dense),
        "best compiled": compiled(topk_mean_best),
        "KeOps": topk_mean_keops,
    }


def build(shape: Shape, device: torch.device) -> Case:
    """``impl="auto"`` beside its peers."""
    torch.compiler.reset()
    chosen = peers()
    if device.type == "cpu" and shape["C"] > KEOPS_CLASSES_ON_CPU:
        del chosen["KeOps"]
    return case(shape, device, chosen)


def case(shape: Shape, device: torch.device, chosen: Mapping[str, Similarity]) -> Case:
    """Some implementations beside each other, on random unit vectors. The first is the baseline."""
    patches, prompts, random = similarity.draw(shape, device)
    N = shape["N"]
    k = tuple(max(1, shape["k"] * (n + 1) // N) for n in range(N))
    grads = None
    if shape["pass"] == similarity.TRAINING:
        decided = _decided(patches.float(), prompts.float(), k, similarity.ROUNDING[shape["dtype"]])
        grads = [random(shape["B"], N, shape["C"]) * decided]

    def function(implementation: Similarity, patches: Tensor, prompts: Tensor) -> tuple[Tensor]:
        return (implementation(patches, prompts, k),)

    def definition(patches: Tensor, prompts: Tensor) -> tuple[Tensor]:
        return (reference.topk_similarity(patches, prompts, [[min(count, shape["P"])] for count in k]),)

    return Case(
        {name: similarity.run(partial(function, one), patches, prompts, grads) for name, one in chosen.items()},
        baseline=next(iter(chosen)),
        truth=similarity.truth(definition, patches, prompts, grads),
        tolerance=similarity.TOLERANCE[shape["dtype"]],
        floors=similarity.floors(shape, patches, prompts, shape["B"] * N * shape["C"]),
    )


def _decided(patches: Tensor, prompts: Tensor, k: Sequence[int], rounding: float) -> Tensor:
    """(B, N, C) bool: the k-th and the next similarity differ by more than rounding.

    Where they do not, which patch is selected is a matter of rounding. No gradient flows there, so that the
    implementations can be compared.
    """
    decided = []
    for prompt, count in zip(prompts, k, strict=True):
        top = (prompt @ patches.mT).topk(min(count + 1, patches.shape[1])).values
        all_selected = count >= patches.shape[1]
        decided.append((top[..., -2] - top[..., -1] > rounding) | all_selected)
    return torch.stack(decided, dim=1)


def _chunks(patches: Tensor, bytes_per_image: int) -> tuple[Tensor, ...]:
    """The patches of as many images at a time as eager code likes best.

    On a CPU, large tensors come fresh from the system each time, and page faults cost time; with 4, 8 and 24 MiB
    instead of 16, code was slower or alike. A GPU keeps its memory, and there all images are taken at once.
    """
    return patches.split(len(patches) if patches.is_cuda else max(1, 2**24 // bytes_per_image))


_CPU = {"dtype": "float32", "pass": "", "B": 32, "P": 196, "N": 4, "D": 512, "C": 397, "k": 20}
_GPU = {**_CPU, "dtype": "bfloat16", "B": 128, "C": 1000}

BENCHMARK = Benchmark(
    name="topk_similarity",
    title="Mean of the largest patch similarities; k = 20 means 5, 10, 15 and 20 of them for four prompts",
    build=build,
    shapes={
        "cpu": similarity.around(_CPU, {"C": (47, 1000), "B": (8, 64), "P": (49, 576), "k": (4, 64)}),
        "cuda": similarity.around(
            _GPU, {"C": (100, 397, 4000), "B": (8, 32, 512, 2048), "P": (49, 576, 1024), "k": (4, 64)}
        ),
    },
    quick_shapes={
        "cpu": similarity.around({**_CPU, "C": 47}, {}),
        "cuda": similarity.around(_GPU, {}),
    },
    sweeps=("B", "C", "P", "k"),
    implementations=tuple(peers()),
)

"""topk_similarity in plain torch and numpy with bounded memory and its own backward, for any device.

The similarity is made one tile (some images, some classes under all prompts) at a time and sorted; on a processor every
core works on tiles of its own, and numpy sorts them, which is several times faster than torch selects. What is kept for
the backward pass are the selected patches themselves. They are few, so both gradients are sums of few features; where
they are many, a matrix product is faster and is used instead.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from threading import Barrier

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of the similarities of one tile. Larger ones take memory, smaller ones time: at 1 MiB half as much again.
TILE_BYTES = 5 * 2**19
# Bytes of the features that one tile sums: they are read many times and should stay in a core's second-level cache.
FEATURE_BYTES = 2**21
# How many selected patches a sum takes at once. Beyond 2^15 torch sorts integers by radix, several times faster.
ENTRIES = 2**16
# Fewer classes make a matrix product inefficient, so a core is left idle instead.
FEWEST_CLASSES = 64
# Where a larger share of the similarities is selected, a dense matrix product is faster than sums of features.
DENSE_SHARE = 1 / 8

Scales = Sequence[Sequence[int]]


def saved_size(B: int, P: int, C: int, k: Scales) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of what is kept for the backward pass: the selected patches, scale after scale."""
    dtype = torch.uint8 if P <= 2**8 else torch.int16 if P <= 2**15 else torch.int32
    return (B, C, sum(map(sum, k))), dtype


def forward(patches: Tensor, prompts: Tensor, k: Scales, keep: bool) -> tuple[Tensor, Tensor]:
    """The values and the selected patches.

    Args:
        patches: (B, P, D).
        prompts: (N, C, D).
        k: for every prompt its S scales, each from 1 to P.
        keep: whether the selected patches are wanted.

    Returns:
        values (B, N, C) in float32 (float64 for float64 inputs) and selected, as `saved_size` says; for every image
        and class k patches of the first scale of the first prompt in ascending order, then those of the next scale.
        Without keep it is empty.
    """
    (B, P, _), (N, C, _) = patches.shape, prompts.shape
    dtype = torch.promote_types(patches.dtype, torch.float32)
    size, kind = saved_size(B, P, C, k)
    values = torch.empty(B, N, C, dtype=dtype, device=patches.device)
    selected = torch.empty(size if keep else 0, dtype=kind, device=patches.device)

    def fill(images: slice, classes: slice) -> None:
        scores = _scores(patches[images], prompts[:, classes], dtype)
        select = _select_in_numpy if scores.device.type == "cpu" else _select
        select(scores, values[images, :, classes], selected[images, classes] if keep else None, k)

    # Classes are cut alike for every batch: what is computed for an image does not depend on the others.
    threads, room = torch.get_num_threads(), max(1, TILE_BYTES // (N * P * dtype.itemsize))
    classes_at_once = min(C, room, max(FEWEST_CLASSES, -(-C // threads)))
    images_at_once = min(room // max(classes_at_once, 1), -(-B // threads))
    tiles = [(images, classes) for classes in _parts(C, classes_at_once) for images in _parts(B, images_at_once)]
    with _exact_bfloat16_products(patches):
        _on_all_cores(fill, tiles, patches.device)
    return values, selected


def grad_patches(grad: Tensor, prompts: Tensor, selected: Tensor, k: Scales, P: int) -> Tensor:
    """The gradient (B, P, D) in the inputs' dtype, from that of the values (B, N, C)."""
    (B, N, C), D = grad.shape, prompts.shape[2]
    result = torch.zeros(B, P, D, dtype=grad.dtype, device=grad.device)
    dense = _is_dense(k, P)
    for classes in _parts(C, FEATURE_BYTES // (N * D * grad.itemsize)):
        features = prompts[:, classes].to(grad.dtype).reshape(-1, D)
        room = TILE_BYTES // (P * grad.itemsize) if dense else ENTRIES * N // selected.shape[2]
        for images in _parts(B, room // len(features)):
            tile = selected[images, classes], grad[images, :, classes]
            total = _weights(*tile, k, P).mT @ features if dense else _sums_of_prompts(*tile, features, k, P)
            result[images] += total.view(-1, P, D)
    return result.to(prompts.dtype)


def grad_prompts(grad: Tensor, patches: Tensor, selected: Tensor, k: Scales) -> Tensor:
    """The gradient (N, C, D) in the inputs' dtype, from that of the values (B, N, C)."""
    (B, P, D), (_, N, C) = patches.shape, grad.shape
    result = torch.zeros(N, C, D, dtype=grad.dtype, device=grad.device)
    dense = _is_dense(k, P)
    for images in _parts(B, FEATURE_BYTES // (P * D * grad.itemsize)):
        features = patches[images].to(grad.dtype)
        room = TILE_BYTES // (N * P * grad.itemsize) if dense else ENTRIES // max(map(max, k))
        for classes in _parts(C, room // len(features)):
            tile = selected[images, classes], grad[images, :, classes]
            if dense:
                result[:, classes] += (_weights(*tile, k, P) @ features.flatten(0, 1)).view(N, -1, D)
            else:
                _add_sums_of_patches(result[:, classes], *tile, features, k)
    return result.to(patches.dtype)


def _parts(length: int, at_once: int) -> Iterator[slice]:
    """Cut an axis into parts of about equal length, none longer than at_once, or than 1 if that is less."""
    step = max(1, -(-length // max(1, -(-length // max(1, at_once)))))
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def _on_all_cores(function: Callable[..., None], tiles: Sequence[tuple[slice, ...]], device: torch.device) -> None:
    """Call the function for every tile; on a processor in one thread a core, each of which computes alone.

    Torch's own threads would meet after every operation, which costs more than a small tile takes.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        for tile in tiles:
            function(*tile)
        return
    inference = torch.is_inference_mode_enabled()

    def run(tile: tuple[slice, ...]) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # these, too, hold for one thread
            function(*tile)

    for _ in _cores(threads).map(run, tiles):
        pass


@cache
def _cores(count: int) -> ThreadPoolExecutor:
    """That many threads, each of which computes alone; kept, because the first use of torch in a thread is slow."""
    threads = torch.get_num_threads()
    try:
        # The setting holds for the thread that makes it, and for threads that torch has not met before.
        pool, ready = ThreadPoolExecutor(count, "fastprompt", torch.set_num_threads, (1,)), Barrier(count)
        list(pool.map(lambda _: ready.wait(), range(count)))
    finally:
        torch.set_num_threads(threads)
    return pool


# A process that was forked has the pool, but not its threads.
os.register_at_fork(after_in_child=_cores.cache_clear)


def _scores(patches: Tensor, prompts: Tensor, dtype: torch.dtype) -> Tensor:
    """The similarities (images, N, classes, P) in the accumulator's dtype.

    One product an image, so that an image's results do not depend on the others in its batch.
    """
    rows, columns = prompts.to(dtype).reshape(-1, prompts.shape[2]), patches.to(dtype).mT
    scores = torch.empty(len(patches), *prompts.shape[:2], patches.shape[1], dtype=dtype, device=patches.device)
    for image, out in zip(columns, scores.flatten(1, 2), strict=True):
        torch.mm(rows, image, out=out)
    return scores


@contextmanager
def _exact_bfloat16_products(inputs: Tensor) -> Iterator[None]:
    """Let the processor's bfloat16 units multiply float32 copies of bfloat16 inputs: nothing is lost, and the sums
    stay in float32. Torch offers no product of bfloat16 matrices with a float32 result on processors.
    """
    settings, before = torch.backends.mkldnn.matmul, torch.backends.mkldnn.matmul.fp32_precision
    if inputs.dtype == torch.bfloat16 and inputs.device.type == "cpu":
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _select(scores: Tensor, values: Tensor, selected: Tensor | None, k: Scales) -> None:
    """Fill values (images, N, classes) and the selected patches (images, classes, sum of all k) of one tile."""
    ranked, patch = scores.sort(dim=-1, descending=True, stable=True)
    start = 0
    for n, scales in enumerate(k):
        values[:, n] = sum(ranked[:, n, :, :scale].mean(-1) for scale in scales) / len(scales)
        for scale in scales if selected is not None else ():
            selected[:, :, start : start + scale] = patch[:, n, :, :scale]
            start += scale


def _select_in_numpy(scores: Tensor, values: Tensor, selected: Tensor | None, k: Scales) -> None:
    """As `_select`, but numpy sorts without Python's lock, and with the processor's vector instructions."""
    rows, P, start = scores.numpy(), scores.shape[-1], 0
    for n, scales in enumerate(k):
        ranked = np.sort(rows[:, n], axis=-1)
        values[:, n] = torch.from_numpy(sum(ranked[..., P - scale :].mean(-1) for scale in scales) / len(scales))
        for scale in scales if selected is not None else ():
            patch = _largest(rows[:, n], ranked[..., P - scale], scale)
            selected[:, :, start : start + scale] = torch.from_numpy(patch)
            start += scale


def _largest(rows: np.ndarray, last: np.ndarray, count: int) -> np.ndarray:
    """The places of the count largest entries of every row, of which `last` is the smallest; the first of equals."""
    P = rows.shape[-1]
    # Written as "not smaller" so that not-a-number is among the largest, and no row has fewer than count.
    chosen = np.less(rows, last[..., None]).reshape(-1, P)
    np.logical_not(chosen, out=chosen)
    places = np.flatnonzero(chosen)
    if len(places) > len(chosen) * count:
        too_many = chosen.sum(-1) > count
        backwards = rows.reshape(-1, P)[too_many, ::-1].argsort(axis=-1, kind="stable")
        chosen[too_many] = False
        first = np.zeros_like(chosen[too_many])
        np.put_along_axis(first, P - 1 - backwards[:, P - count :], True, axis=-1)
        chosen[too_many] = first
        places = np.flatnonzero(chosen)
    return (places.reshape(-1, count) - P * np.arange(len(chosen))[:, None]).reshape(*rows.shape[:-1], count)


def _is_dense(k: Scales, P: int) -> bool:
    return sum(map(sum, k)) > DENSE_SHARE * len(k) * P


def _levels(k: Scales) -> list[tuple[int, int, float]]:
    """For every scale of every prompt: the prompt, the scale and the weight of one patch in the value."""
    return [(n, scale, 1 / (scale * len(scales))) for n, scales in enumerate(k) for scale in scales]


def _sums_of_prompts(selected: Tensor, grad: Tensor, prompts: Tensor, k: Scales, P: int) -> Tensor:
    """For every patch of a tile (images * P, D): the weighted sum of the prompts (N * classes, D) that selected it."""
    images, classes, _ = selected.shape
    prompt, scale, weight = (torch.tensor(column, device=grad.device) for column in zip(*_levels(k), strict=True))
    prompt, weight = prompt.repeat_interleave(scale), weight.to(grad.dtype).repeat_interleave(scale)
    weights = grad.mT.index_select(2, prompt).mul_(weight)
    rows = (prompt * classes + torch.arange(classes, device=grad.device)[:, None]).expand(images, -1, -1)
    patch = torch.arange(images * P, dtype=torch.int16 if images * P < 2**15 else torch.int32, device=grad.device)
    # The order is stable, so a patch's prompts are added in the same order whatever images come with it.
    keys, order = (selected + patch[::P, None, None]).flatten().sort(stable=True)
    return F.embedding_bag(
        rows.flatten().index_select(0, order),
        prompts,
        torch.searchsorted(keys, patch),
        mode="sum",
        per_sample_weights=weights.flatten().index_select(0, order),
    )


def _add_sums_of_patches(result: Tensor, selected: Tensor, grad: Tensor, patches: Tensor, k: Scales) -> None:
    """Add to every prompt (N, classes, D) the weighted sum of the patches (images, P, D) that it selected."""
    P, start = patches.shape[1], 0
    first_rows = P * torch.arange(len(patches), dtype=torch.int32, device=grad.device)[:, None]
    for n, scale, weight in _levels(k):
        rows = (selected[:, :, start : start + scale].transpose(0, 1) + first_rows).flatten(1)
        weights = (grad[:, n].mT * weight).repeat_interleave(scale, dim=1)
        result[n] += F.embedding_bag(rows, patches.flatten(0, 1), mode="sum", per_sample_weights=weights)
        start += scale


def _weights(selected: Tensor, grad: Tensor, k: Scales, P: int) -> Tensor:
    """The gradient of a tile of the similarity as one matrix (N * classes, images * P)."""
    images, classes, _ = selected.shape
    weights = torch.zeros(len(k), classes, images, P, dtype=grad.dtype, device=grad.device)
    start = 0
    for n, scale, weight in _levels(k):
        patch = selected[:, :, start : start + scale].transpose(0, 1).long()
        weights[n].scatter_add_(2, patch, (grad[:, n].mT * weight)[:, :, None].expand_as(patch))
        start += scale
    return weights.view(len(k) * classes, images * P)

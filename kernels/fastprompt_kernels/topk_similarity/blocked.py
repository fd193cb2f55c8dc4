"""topk_similarity in plain torch and numpy with bounded memory and its own backward, for any device.

The similarity is made one tile (some images, some classes under all prompts) at a time and sorted; on a processor every
core works on tiles of its own, and numpy sorts them, which is several times faster than torch selects. What is kept for
the backward pass are the selected patches themselves. They are few, so both gradients are sums of few features; where
they are many, a matrix product is faster and is used instead.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import accumulate, product
from queue import SimpleQueue
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
ENTRIES = 5 * 2**13
# Where a larger share of the similarities is selected, a dense matrix product is faster than sums of features.
DENSE_SHARE = 1 / 8

Scales = Sequence[Sequence[int]]
Scratch = tuple[Tensor, Tensor, Tensor]


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
    (B, P, _), (N, C, _), prompts = patches.shape, prompts.shape, prompts.contiguous()
    dtype = torch.promote_types(patches.dtype, torch.float32)
    size, kind = saved_size(B, P, C, k)
    values = torch.empty(B, N, C, dtype=dtype, device=patches.device)
    selected = torch.empty(size if keep else 0, dtype=kind, device=patches.device)

    # Rows are cut alike for every batch: what is computed for an image does not depend on the others.
    rows_at_once = max(1, min(N * C, TILE_BYTES // (P * dtype.itemsize)))
    images_at_once = max(1, min(TILE_BYTES // (rows_at_once * P * dtype.itemsize), -(-B // torch.get_num_threads())))
    starts = list(accumulate(map(sum, k), initial=0))
    select = _select_in_numpy if patches.device.type == "cpu" else _select

    def scratch() -> Scratch:
        scores = torch.empty(images_at_once * rows_at_once * P, dtype=dtype, device=patches.device)
        ranked = torch.empty(images_at_once * min(C, rows_at_once) * P, dtype=dtype, device=patches.device)
        return scores, ranked, torch.empty_like(ranked, dtype=torch.bool)

    def fill(images: slice, rows: slice, scratch: Scratch) -> None:
        scores = _scores(patches[images].to(dtype), prompts.view(N * C, -1)[rows].to(dtype), scratch[0])
        for n, classes in _prompts_of(rows, C):
            of_prompt = scores[:, n * C + classes.start - rows.start :][:, : classes.stop - classes.start]
            taken = selected[images, classes, starts[n] : starts[n + 1]] if keep else None
            select(of_prompt, values[images, n, classes], taken, k[n], *scratch[1:])

    tiles = list(product(_parts(B, images_at_once), _parts(N * C, rows_at_once)))
    with _exact_bfloat16_products(patches):
        _on_all_cores(fill, tiles, scratch, patches.device)
    return values, selected


def grad_patches(grad: Tensor, prompts: Tensor, selected: Tensor, k: Scales, P: int) -> Tensor:
    """The gradient (B, P, D) in the inputs' dtype, from that of the values (B, N, C)."""
    (B, N, C), D = grad.shape, prompts.shape[2]
    result = torch.zeros(B, P, D, dtype=grad.dtype, device=grad.device)
    features, dense = prompts.to(grad.dtype), _is_dense(k, P)
    for classes in _parts(C, FEATURE_BYTES // (N * D * grad.itemsize)):
        count = classes.stop - classes.start
        room = TILE_BYTES // (N * count * P * grad.itemsize) if dense else ENTRIES // (count * selected.shape[2])
        for images in _parts(B, room):
            tile = selected[images, classes], grad[images, :, classes]
            # No name for the summand: it would still be there while the next one is computed.
            if dense:
                result[images] += (_weights(*tile, k, P).mT @ features[:, classes].flatten(0, 1)).view(-1, P, D)
            else:
                result[images] += _sums_of_prompts(*tile, features, classes.start, k, P)
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


def _prompts_of(rows: slice, C: int) -> Iterator[tuple[int, slice]]:
    """The prompts, and of each the classes, whose similarities lie in some rows of all prompts' classes."""
    for n in range(rows.start // C, -(-rows.stop // C)):
        yield n, slice(max(rows.start - n * C, 0), min(rows.stop - n * C, C))


def _on_all_cores(
    function: Callable[..., None], tiles: Sequence[tuple], scratch: Callable[[], Scratch], device: torch.device
) -> None:
    """Call the function for every tile; on a processor in one thread a core, each of which computes alone.

    Torch's own threads would meet after every operation, which costs more than a small tile takes. Scratch memory is
    taken here, because what a thread takes for itself stays with it.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    free, inference = SimpleQueue(), torch.is_inference_mode_enabled()
    for _ in range(min(threads, len(tiles))):
        free.put(scratch())

    def run(tile: tuple) -> None:
        memory = free.get()
        with torch.inference_mode(inference), torch.no_grad():  # these hold for one thread
            function(*tile, memory)
        free.put(memory)

    for _ in map(run, tiles) if threads == 1 else _cores(threads).map(run, tiles):
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


def _scores(patches: Tensor, prompts: Tensor, scratch: Tensor) -> Tensor:
    """The similarities (images, rows, P) of patches (images, P, D) and prompts (rows, D).

    One product an image, so that an image's results do not depend on the others in its batch.
    """
    size = len(patches), len(prompts), patches.shape[1]
    scores = scratch[: math.prod(size)].view(size)
    for image, out in zip(patches, scores, strict=True):
        torch.mm(prompts, image.mT, out=out)
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


def _select(scores: Tensor, values: Tensor, selected: Tensor | None, scales: Sequence[int], *scratch: Tensor) -> None:
    """Fill values (images, classes) and the selected patches (images, classes, sum of the scales) of one prompt."""
    ranked, patch = scores.sort(dim=-1, descending=True, stable=True)
    values.copy_(sum(ranked[..., :scale].mean(-1) for scale in scales) / len(scales))
    if selected is not None:
        selected.copy_(torch.cat([patch[..., :scale] for scale in scales], dim=-1))


def _select_in_numpy(
    scores: Tensor, values: Tensor, selected: Tensor | None, scales: Sequence[int], ranked: Tensor, chosen: Tensor
) -> None:
    """As `_select`, but numpy sorts without Python's lock, and with the processor's vector instructions."""
    P, ranked = scores.shape[-1], ranked[: scores.numel()].view(scores.shape).copy_(scores)
    ranked.numpy().sort(axis=-1)
    values.copy_(sum(ranked[..., P - scale :].mean(-1) for scale in scales) / len(scales))
    start, chosen = 0, chosen[: scores.numel()].view(-1, P).numpy()
    for scale in scales if selected is not None else ():
        patch = _largest(scores.numpy(), ranked[..., P - scale, None].numpy(), scale, chosen)
        selected[..., start : start + scale] = torch.from_numpy(patch)
        start += scale


def _largest(rows: np.ndarray, last: np.ndarray, count: int, chosen: np.ndarray) -> np.ndarray:
    """The places of the count largest entries of every row, of which `last` is the smallest; the first of equals."""
    P = rows.shape[-1]
    # Written as "not smaller" so that not-a-number is among the largest, and no row has fewer than count.
    np.less(rows, last, out=chosen.reshape(rows.shape))
    np.logical_not(chosen, out=chosen)
    places = np.flatnonzero(chosen)
    if len(places) > len(chosen) * count:
        too_many = chosen.sum(-1) > count
        backwards = rows.reshape(-1, P)[too_many, ::-1].argsort(axis=-1, kind="stable")
        first = np.zeros(backwards.shape, dtype=bool)
        np.put_along_axis(first, P - 1 - backwards[:, P - count :], True, axis=-1)
        chosen[too_many] = first
        places = np.flatnonzero(chosen)
    places = places.reshape(-1, count)
    places -= P * np.arange(len(chosen))[:, None]
    return places.reshape(*rows.shape[:-1], count)


def _is_dense(k: Scales, P: int) -> bool:
    return sum(map(sum, k)) > DENSE_SHARE * len(k) * P


def _levels(k: Scales) -> list[tuple[int, int, float]]:
    """For every scale of every prompt: the prompt, the scale and the weight of one patch in the value."""
    return [(n, scale, 1 / (scale * len(scales))) for n, scales in enumerate(k) for scale in scales]


def _sums_of_prompts(selected: Tensor, grad: Tensor, prompts: Tensor, first_class: int, k: Scales, P: int) -> Tensor:
    """For every patch of a tile (images, P, D): the weighted sum of those of all prompts (N, C, D) that selected it."""
    (images, classes, _), (_, C, D) = selected.shape, prompts.shape
    prompt, scale, weight = (torch.tensor(column, device=grad.device) for column in zip(*_levels(k), strict=True))
    prompt, weight = prompt.repeat_interleave(scale), weight.to(grad.dtype).repeat_interleave(scale)
    weights = grad.mT.index_select(2, prompt).mul_(weight)
    rows = prompt * C + first_class + torch.arange(classes, device=grad.device)[:, None]
    patch = torch.arange(images * P, dtype=torch.int16 if images * P < 2**15 else torch.int32, device=grad.device)
    # The order is stable, so a patch's prompts are added in the same order whatever images come with it.
    keys, order = (selected + patch[::P, None, None]).flatten().sort(stable=True)
    sums = F.embedding_bag(
        rows.expand(images, -1, -1).flatten().index_select(0, order),
        prompts.flatten(0, 1),
        torch.searchsorted(keys, patch),
        mode="sum",
        per_sample_weights=weights.flatten().index_select(0, order),
    )
    return sums.view(images, P, D)


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

"""topk_similarity in plain torch and numpy with bounded memory and its own backward, for any device.

The similarity is made one tile (some images, some classes under all prompts) at a time and sorted; on a processor every
core works on tiles of its own, and numpy sorts them, which is several times faster than torch selects. What is kept for
the backward pass are the selected patches themselves. They are few, so both gradients are sums of few features; where
they are many, a matrix product is faster and is used instead.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
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
TILE_BYTES = 5 * 2**18
# Rows that a matrix product needs to be efficient: prompts of fewer classes are multiplied together.
EFFICIENT_ROWS = 128
# Bytes of the features of all prompts' classes that one tile reads, or makes: half of a core's second-level cache.
FEATURE_BYTES = 2**20
# How many selected patches one tile sums. With fewer, handing over takes as long as summing.
ENTRIES = 2**15
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
    (B, P, _), (N, C, _), prompts = patches.shape, prompts.shape, prompts.contiguous()
    dtype = torch.promote_types(patches.dtype, torch.float32)
    size, kind = saved_size(B, P, C, k)
    values = torch.empty(B, N, C, dtype=dtype, device=patches.device)
    selected = torch.empty(size if keep else 0, dtype=kind, device=patches.device)

    # Rows are cut alike for every batch: what is computed for an image does not depend on the others.
    room = TILE_BYTES // (P * dtype.itemsize)
    rows_at_once = max(1, min(C if C >= EFFICIENT_ROWS else N * C, room))
    images_at_once = max(1, min(room // rows_at_once, -(-B // torch.get_num_threads())))
    starts = list(accumulate(map(sum, k), initial=0))
    select = _select_in_numpy if patches.device.type == "cpu" else _select

    def scratch() -> tuple[Tensor, Tensor, Tensor]:
        scores = torch.empty(images_at_once * rows_at_once * P, dtype=dtype, device=patches.device)
        ranked = torch.empty(images_at_once * min(C, rows_at_once) * P, dtype=dtype, device=patches.device)
        return scores, ranked, torch.empty_like(ranked, dtype=torch.bool)

    def fill(images: slice, rows: slice, *scratch: Tensor) -> None:
        scores = _scores(patches[images].to(dtype), prompts.view(N * C, -1)[rows].to(dtype), scratch[0])
        for n, classes in _prompts_of(rows, C):
            of_prompt = scores[:, n * C + classes.start - rows.start :][:, : classes.stop - classes.start]
            taken = selected[images, classes, starts[n] : starts[n + 1]] if keep else None
            select(of_prompt, values[images, n, classes], taken, k[n], *scratch[1:])

    tiles = product(_parts(B, images_at_once), _parts(N * C, rows_at_once))
    with _exact_bfloat16_products(patches):
        _on_all_cores(fill, tiles, patches.device, scratch)
    return values, selected


def grad_patches(grad: Tensor, prompts: Tensor, selected: Tensor, k: Scales, P: int) -> Tensor:
    """The gradient (B, P, D) in the inputs' dtype, from that of the values (B, N, C)."""
    (B, N, C), D = grad.shape, prompts.shape[2]
    features, shares = prompts.to(grad.dtype), _shares(grad, k)
    result = torch.zeros(B, P, D, dtype=grad.dtype, device=grad.device)
    classes_at_once = max(1, min(C, FEATURE_BYTES // (N * D * grad.itemsize)))
    dense, images_at_once = _is_dense(k, P), ENTRIES // (classes_at_once * selected.shape[2])
    if dense:
        images_at_once = TILE_BYTES // (N * classes_at_once * P * grad.itemsize)
    images_at_once = max(1, min(images_at_once, -(-B // torch.get_num_threads())))
    parts = [(classes, _entries(k, C, classes, images_at_once, grad.device)) for classes in _parts(C, classes_at_once)]

    def fill(images: slice) -> None:
        for classes, entries in parts:
            # No name for the summand: it would still be there while the next one is computed.
            if dense:
                weights = _weights(selected[images, classes], shares[images, :, classes], k, P)
                result[images] += (weights.mT @ features[:, classes].flatten(0, 1)).view(-1, P, D)
            else:
                tile = selected[images, classes], shares[images]
                result[images] += _sums_of_prompts(*tile, features.flatten(0, 1), *entries, P)

    _on_all_cores(fill, zip(_parts(B, images_at_once)), grad.device)
    return result.to(prompts.dtype)


def grad_prompts(grad: Tensor, patches: Tensor, selected: Tensor, k: Scales) -> Tensor:
    """The gradient (N, C, D) in the inputs' dtype, from that of the values (B, N, C)."""
    (B, P, D), (_, N, C) = patches.shape, grad.shape
    result, shares = torch.zeros(N, C, D, dtype=grad.dtype, device=grad.device), _shares(grad, k)
    dense = _is_dense(k, P)
    threads = torch.get_num_threads()
    # As many parts for every thread, or some would wait for the others in the end.
    rounds = -(-C // (threads * max(1, FEATURE_BYTES // (N * D * grad.itemsize))))
    classes_at_once = max(1, -(-C // max(1, threads * rounds)))
    images_at_once = (
        TILE_BYTES // (N * P * grad.itemsize) if dense else ENTRIES // selected.shape[2]
    ) // classes_at_once

    def fill(classes: slice) -> None:
        for images in _parts(B, images_at_once):
            features = patches[images].to(grad.dtype)
            tile = selected[images, classes], shares[images, :, classes]
            if dense:
                result[:, classes] += (_weights(*tile, k, P) @ features.flatten(0, 1)).view(N, -1, D)
            else:
                result[:, classes] += _sums_of_patches(*tile, features, k)

    _on_all_cores(fill, zip(_parts(C, classes_at_once)), grad.device)
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
    function: Callable[..., None],
    tiles: Iterable[tuple],
    device: torch.device,
    scratch: Callable[[], tuple[Tensor, ...]] = tuple,
) -> None:
    """Call the function for every tile; on a processor in one thread a core, each of which computes alone.

    Torch's own threads would meet in every operation, which costs more than a small tile takes. Scratch memory is
    taken here, because what a thread takes for itself stays with it.
    """
    threads, tiles = torch.get_num_threads() if device.type == "cpu" else 1, list(tiles)
    free, inference = SimpleQueue(), torch.is_inference_mode_enabled()
    for _ in range(min(threads, len(tiles))):
        free.put(scratch())

    def run(tile: tuple) -> None:
        memory = free.get()
        with torch.inference_mode(inference), torch.no_grad():  # these hold for one thread
            function(*tile, *memory)
        free.put(memory)

    for _ in map(run, tiles) if threads == 1 else _cores(threads).map(run, tiles):
        pass


@cache
def _cores(count: int) -> ThreadPoolExecutor:
    """That many threads, each of which computes alone; kept, because the first use of torch in a thread is slow."""
    threads, ready = torch.get_num_threads(), Barrier(count)

    def alone() -> None:
        torch.get_num_threads()  # a thread that asks for the first time takes over what is set for all
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(count, "fastprompt", alone)
    list(pool.map(lambda _: ready.wait(), range(count)))
    torch.set_num_threads(threads)  # for this thread it still was, but not for those to come
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


def _levels(k: Scales) -> list[tuple[int, int]]:
    """For every scale of every prompt: the prompt and the scale."""
    return [(n, scale) for n, scales in enumerate(k) for scale in scales]


def _shares(grad: Tensor, k: Scales) -> Tensor:
    """(B, N * S, C): what every selected patch receives of the gradient of a value."""
    return torch.stack([grad[:, n] / (scale * len(k[n])) for n, scale in _levels(k)], dim=1)


def _entries(k: Scales, C: int, classes: slice, images: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For every entry of `selected` in a tile: the row of its prompt in (N * C), and the place of its share in
    (images, N * S, C).
    """
    levels, every_class = _levels(k), torch.arange(classes.start, classes.stop, device=device)[:, None]
    counts = [scale for _, scale in levels]
    row = torch.from_numpy(np.repeat([n * C for n, _ in levels], counts)).to(device) + every_class
    share = torch.from_numpy(np.repeat(np.arange(len(levels)) * C, counts)).to(device) + every_class
    image = torch.arange(images, device=device)[:, None, None] * (len(levels) * C)
    return row.expand(images, -1, -1).flatten(), (share + image).flatten()


def _sums_of_prompts(selected: Tensor, shares: Tensor, prompts: Tensor, row: Tensor, share: Tensor, P: int) -> Tensor:
    """For every patch of a tile (images, P, D): the weighted sum of the prompts (N * C, D) that selected it."""
    images = len(selected)
    patch = torch.arange(images * P, dtype=torch.int16 if images * P < 2**15 else torch.int32, device=selected.device)
    keys = (selected + patch[::P, None, None]).flatten()
    # The order is stable, so a patch's prompts are added in the same order whatever images come with it.
    if keys.device.type == "cpu":
        order = torch.from_numpy(keys.numpy().argsort(kind="stable"))
    else:
        order = keys.argsort(stable=True)
    sums = F.embedding_bag(
        row.index_select(0, order),
        prompts,
        torch.searchsorted(keys.index_select(0, order), patch),
        mode="sum",
        per_sample_weights=shares.flatten().index_select(0, share.index_select(0, order)),
    )
    return sums.view(images, P, -1)


def _sums_of_patches(selected: Tensor, shares: Tensor, patches: Tensor, k: Scales) -> Tensor:
    """For every prompt (N, classes, D): the weighted sum of the patches (images, P, D) that it selected."""
    (images, classes, W), (_, P, D) = selected.shape, patches.shape
    scales = [scale for _, scale in _levels(k)]
    rows = selected + P * torch.arange(images, dtype=torch.int32, device=selected.device)[:, None, None]
    rows = [part.transpose(0, 1).flatten(1) for part in rows.split(scales, dim=2)]
    weights = [shares[:, level].mT[:, :, None].expand(-1, -1, scale).flatten(1) for level, scale in enumerate(scales)]
    # A class's levels lie side by side: threads, which share out the sums, then have equally much to do.
    starts = images * (W * np.arange(classes)[:, None] + np.cumsum([0, *scales[:-1]]))
    sums = F.embedding_bag(
        torch.cat(rows, dim=1).flatten(),
        patches.flatten(0, 1),
        torch.from_numpy(starts).flatten().to(rows[0]),
        mode="sum",
        per_sample_weights=torch.cat(weights, dim=1).flatten(),
    )
    sums = sums.view(classes, len(k), -1, D)
    return (sums[:, :, 0] if sums.shape[2] == 1 else sums.sum(2)).transpose(0, 1)


def _weights(selected: Tensor, shares: Tensor, k: Scales, P: int) -> Tensor:
    """The gradient of a tile of the similarity as one matrix (N * classes, images * P)."""
    images, classes, _ = selected.shape
    weights = torch.zeros(len(k), classes, images, P, dtype=shares.dtype, device=shares.device)
    start = 0
    for level, (n, scale) in enumerate(_levels(k)):
        patch = selected[:, :, start : start + scale].transpose(0, 1).long()
        weights[n].scatter_add_(2, patch, shares[:, level].mT[:, :, None].expand_as(patch))
        start += scale
    return weights.view(len(k) * classes, images * P)

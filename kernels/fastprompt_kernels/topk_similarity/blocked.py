"""topk_similarity in plain torch and numpy with bounded memory and its own backward, for any device.

The similarity is made one tile (some images, some classes) at a time and sorted; on a processor every core works on
tiles of its own, and numpy sorts them, which is several times faster than torch selects. What is kept for the backward
pass (blocked_backward.py) are the selected patches themselves.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, product

import numpy as np
import torch
from torch import Tensor

from ..cores import exact_bfloat16_products, on_all_cores, parts
from .blocked_backward import Scales, backward

__all__ = ["backward", "forward", "saved_size"]

# Bytes of the similarities of one tile. Larger ones take memory, smaller ones time: at 1 MiB half as much again.
TILE_BYTES = 5 * 2**18
# Rows that a matrix product needs to be efficient: prompts of fewer classes are multiplied together.
EFFICIENT_ROWS = 128
# Multiplications of an image's similarity that are done before other threads are awake.
LITTLE = 2**20


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
    (B, P, D), (N, C, _), prompts = patches.shape, prompts.shape, prompts.contiguous()
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

    tiles = product(parts(B, images_at_once), parts(N * C, rows_at_once))
    with exact_bfloat16_products(patches):
        # What is little is told by one image, for the same reason.
        on_all_cores(fill, tiles, patches.device, scratch, little=N * C * P * D < LITTLE)
    return values, selected


def _prompts_of(rows: slice, C: int) -> Iterator[tuple[int, slice]]:
    """The prompts, and of each the classes, whose similarities lie in some rows of all prompts' classes."""
    for n in range(rows.start // C, -(-rows.stop // C)):
        yield n, slice(max(rows.start - n * C, 0), min(rows.stop - n * C, C))


def _scores(patches: Tensor, prompts: Tensor, scratch: Tensor) -> Tensor:
    """The similarities (images, rows, P) of patches (images, P, D) and prompts (rows, D).

    One product an image, so that an image's results do not depend on the others in its batch.
    """
    size = len(patches), len(prompts), patches.shape[1]
    scores = scratch[: math.prod(size)].view(size)
    for image, out in zip(patches, scores, strict=True):
        torch.mm(prompts, image.mT, out=out)
    return scores


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

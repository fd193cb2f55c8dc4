"""topk_similarity on processors with bounded memory and its own backward pass.

The similarity is made one tile (some images, some classes) at a time and sorted. Every core works on tiles of its own
where there are many similarities, and numpy sorts them, which is several times faster than torch selects. What is kept
for the backward pass (blocked_backward.py) are the selected patches themselves.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, product

import numpy as np
import torch
from torch import Tensor

from ..cores import exact_bfloat16_products, on_all_cores, parts, products, scratch_memory
from .blocked_backward import backward
from .dense import Scales, saved_size

__all__ = ["backward", "forward", "saved_size"]

# Bytes of the similarities of one tile. Larger ones take memory, smaller ones time.
TILE_BYTES = 5 * 2**19
# Rows that a matrix product needs to be efficient: prompts of fewer classes are multiplied together.
EFFICIENT_ROWS = 128
# With fewer similarities torch's own threads multiply and the calling thread sorts: several threads of ours would lose
# more by meeting at Python's lock than they gain.
LITTLE = 5 * 2**18


def forward(patches: Tensor, prompts: Tensor, k: Scales, keep: bool) -> tuple[Tensor, Tensor]:
    """The values and the selected patches.

    Args:
        patches: (B, P, D).
        prompts: (N, C, D).
        k: for every prompt its S scales, each from 1 to P.
        keep: whether the selected patches are wanted.

    Returns:
        values (B, N, C) in float32 (float64 for float64 inputs) and selected, as `saved_size` says; for every image
        and class the patches of the first scale of the first prompt, then those of the next scale.
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
    little = B * N * C * P < LITTLE
    images_at_once = max(1, min(room // rows_at_once, -(-B // (1 if little else torch.get_num_threads()))))
    starts = list(accumulate(map(sum, k), initial=0))

    def scratch() -> tuple[Tensor, ...]:
        sizes = (images_at_once * rows_at_once * P, images_at_once * min(C, rows_at_once) * P)
        # Pages that come fresh from the system take time, too.
        return tuple(torch.empty(size, dtype=dtype) if little else scratch_memory(size, dtype) for size in sizes)

    def fill(images: slice, rows: slice, scores: Tensor, ranked: Tensor) -> None:
        scores = _scores(patches[images].to(dtype), prompts.view(N * C, -1)[rows].to(dtype), scores)
        for n, classes in _prompts_of(rows, C):
            of_prompt = scores[:, n * C + classes.start - rows.start :][:, : classes.stop - classes.start]
            taken = selected[images, classes, starts[n] : starts[n + 1]] if keep else None
            _select(of_prompt, values[images, n, classes], taken, k[n], ranked)

    tiles = product(parts(B, images_at_once), parts(N * C, rows_at_once))
    with exact_bfloat16_products(patches):
        on_all_cores(fill, tiles, patches.device, scratch, little)
    return values, selected


def _prompts_of(rows: slice, C: int) -> Iterator[tuple[int, slice]]:
    """The prompts, and of each the classes, whose similarities lie in some rows of all prompts' classes."""
    for n in range(rows.start // C, -(-rows.stop // C)):
        yield n, slice(max(rows.start - n * C, 0), min(rows.stop - n * C, C))


def _scores(patches: Tensor, prompts: Tensor, scratch: Tensor) -> Tensor:
    """The similarities (images, rows, P) of patches (images, P, D) and prompts (rows, D).

    A product an image, so that an image's results do not depend on the others in its batch.
    """
    size = len(patches), len(prompts), patches.shape[1]
    scores = scratch[: math.prod(size)].view(size)
    products(prompts.expand(len(patches), -1, -1), patches.mT, out=scores)
    return scores


def _select(scores: Tensor, values: Tensor, selected: Tensor | None, scales: Sequence[int], scratch: Tensor) -> None:
    """Fill values (images, classes) and the selected patches (images, classes, sum of the scales) of one prompt."""
    P, ranked = scores.shape[-1], scratch[: scores.numel()].view(scores.shape)
    if selected is None:
        ranked.copy_(scores).numpy().sort(axis=-1)
        values.copy_(sum(ranked[..., P - scale :].mean(-1) for scale in scales) / len(scales))
        return
    largest, start, means = _Largest(scores, ranked), 0, []
    for scale in scales:
        patch = torch.from_numpy(largest(scale))
        selected[..., start : start + scale] = patch
        means.append(scores.gather(-1, patch).mean(-1))
        start += scale
    values.copy_(sum(means) / len(means))


class _Largest:
    """Which entries of every row are the largest; the first of equals, and not-a-number before all others.

    Numbers are sorted that have their own place as their last bits, so that places come out of the sort. Where
    the first bits do not tell the last that counts from the next, its row is sorted again as it was.
    """

    def __init__(self, rows: Tensor, ranked: Tensor) -> None:
        self.rows, self.ranked = rows.numpy(), ranked.numpy()
        bits, P = np.dtype(f"i{ranked.itemsize}"), ranked.shape[-1]
        self.last_bits = bits.type((1 << (P - 1).bit_length()) - 1)
        self.keys = self.ranked.view(bits)
        np.bitwise_and(self.rows.view(bits), ~self.last_bits, out=self.keys)
        np.bitwise_or(self.keys, np.arange(P, dtype=bits), out=self.keys)
        self.ranked.sort(axis=-1)

    def __call__(self, count: int) -> np.ndarray:
        """Their places, (..., count)."""
        P = self.rows.shape[-1]
        places = np.bitwise_and(self.keys[..., P - count :], self.last_bits, dtype=np.int64)
        # An infinite number with a place is not a number any more, and comes out last.
        unsure = ~np.isfinite(self.ranked[..., -1])
        if count < P:
            edge = np.bitwise_and(self.keys[..., P - count - 1 : P - count + 1], ~self.last_bits)
            edge = edge.view(self.ranked.dtype)
            unsure |= edge[..., 0] == edge[..., 1]
        if unsure.any():
            backwards = self.rows[unsure][:, ::-1].argsort(axis=-1, kind="stable")
            places[unsure] = P - 1 - backwards[:, P - count :]
        return places

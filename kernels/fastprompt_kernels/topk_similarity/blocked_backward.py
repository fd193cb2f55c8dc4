"""The backward pass of topk_similarity in plain torch: sums of the features that were selected.

They are few, so both gradients are sums of few features. Where they are many, a matrix product is faster and is used
instead.
"""

from collections.abc import Sequence
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..cores import even_parts, on_all_cores, parts

# Bytes of the similarities of one tile, where it is dense.
TILE_BYTES = 5 * 2**18
# Bytes of the features of all prompts' classes that one tile reads, or makes: a core's second-level cache.
FEATURE_BYTES = 2**21
# How many selected patches one tile sums. With fewer, handing over takes as long as summing.
ENTRIES = 2**15
# Where a larger share of the similarities is selected, a dense matrix product is faster than sums of features.
DENSE_SHARE = 1 / 8
# Selected patches that are summed before other threads are awake.
LITTLE = 2**12

Scales = Sequence[Sequence[int]]


def backward(
    grad: Tensor, patches: Tensor | None, prompts: Tensor | None, selected: Tensor, k: Scales, P: int
) -> tuple[Tensor, Tensor]:
    """The gradients (B, P, D) and (N, C, D) in the inputs' dtype, from that of the values (B, N, C).

    Each needs the other input. Where that is None the gradient is not made, and is (0,).
    """
    shares, of_patches, of_prompts = _shares(grad, k), grad.new_empty(0), grad.new_empty(0)
    tiles = []
    if prompts is not None:
        of_patches = _grad_patches(shares, prompts.to(grad.dtype), selected, k, P, tiles)
    if patches is not None:
        of_prompts = _grad_prompts(shares, patches, selected, k, tiles)
    # Sums of features are the same bits in any thread; matrix products may not be, and stay where they are.
    little = selected.numel() < LITTLE and not _is_dense(k, P)
    on_all_cores(lambda fill, part: fill(part), tiles, grad.device, little=little)
    dtype = prompts.dtype if patches is None else patches.dtype
    return of_patches.to(dtype), of_prompts.to(dtype)


def _grad_patches(shares: Tensor, prompts: Tensor, selected: Tensor, k: Scales, P: int, tiles: list) -> Tensor:
    """The gradient (B, P, D), which is there once all that is appended to tiles has been called."""
    (N, C, D), B, dense = prompts.shape, len(shares), _is_dense(k, P)
    result = shares.new_empty(B, P, D) if C else shares.new_zeros(B, P, D)
    classes_at_once = min(C, FEATURE_BYTES // (N * D * shares.itemsize))
    cells = TILE_BYTES // (N * P * shares.itemsize) if dense else ENTRIES // selected.shape[2]
    entries = cache(partial(_entries, k, C, shares.device))

    def fill(images: slice) -> None:
        for classes in parts(C, classes_at_once):
            tile = selected[images, classes]
            if dense:
                weights = _weights(tile, shares[images, :, classes], k, P).view(-1, len(tile), P)
                rows = prompts[:, classes].flatten(0, 1)
                # One product an image, so that its gradient does not depend on the others in its batch.
                total = torch.stack([weights[:, image].mT @ rows for image in range(len(tile))])
            else:
                # The first row and share of the tile are those of its first class; the others lie relative to them.
                rows = prompts.flatten(0, 1)[classes.start :], shares[images].flatten()[classes.start :]
                total = _sums_of_prompts(tile, *rows, *entries(*tile.shape[:2]), P)
            result[images].copy_(total) if classes.start == 0 else result[images].add_(total)
            del total  # or it would still be there while the next one is computed

    tiles += [(fill, images) for images in even_parts(B, cells // max(classes_at_once, 1))]
    return result


def _grad_prompts(shares: Tensor, patches: Tensor, selected: Tensor, k: Scales, tiles: list) -> Tensor:
    """The gradient (N, C, D), which is there once all that is appended to tiles has been called."""
    (B, P, D), N, C, dense = patches.shape, len(k), shares.shape[2], _is_dense(k, patches.shape[1])
    result = shares.new_empty(N, C, D) if B else shares.new_zeros(N, C, D)
    classes_at_once = min(C, FEATURE_BYTES // (N * D * shares.itemsize))
    cells = TILE_BYTES // (N * P * shares.itemsize) if dense else ENTRIES // selected.shape[2]

    def fill(classes: slice) -> None:
        for images in parts(B, cells // (classes.stop - classes.start)):
            features = patches[images].to(shares.dtype)
            tile = selected[images, classes], shares[images, :, classes]
            if dense:
                total = (_weights(*tile, k, P) @ features.flatten(0, 1)).view(N, -1, D)
            else:
                total = _sums_of_patches(*tile, features, k)
            result[:, classes].copy_(total) if images.start == 0 else result[:, classes].add_(total)
            del total

    tiles += [(fill, classes) for classes in even_parts(C, classes_at_once)]
    return result


def _is_dense(k: Scales, P: int) -> bool:
    return sum(map(sum, k)) > DENSE_SHARE * len(k) * P


def _levels(k: Scales) -> list[tuple[int, int]]:
    """For every scale of every prompt: the prompt and the scale."""
    return [(n, scale) for n, scales in enumerate(k) for scale in scales]


def _shares(grad: Tensor, k: Scales) -> Tensor:
    """(B, N * S, C): what every selected patch receives of the gradient of a value."""
    return torch.stack([grad[:, n] / (scale * len(k[n])) for n, scale in _levels(k)], dim=1)


def _entries(k: Scales, C: int, device: torch.device, images: int, classes: int) -> tuple[Tensor, Tensor]:
    """For every entry of `selected` in a tile: the row of its prompt in (N * C, D), and the place of its share in
    (images, N * S, C), for the first classes.
    """
    levels, every_class = _levels(k), torch.arange(classes, device=device)[:, None]
    counts = [scale for _, scale in levels]
    row = torch.from_numpy(np.repeat([n * C for n, _ in levels], counts)).to(device) + every_class
    share = torch.from_numpy(np.repeat(np.arange(len(levels)) * C, counts)).to(device) + every_class
    image = torch.arange(images, device=device)[:, None, None] * (len(levels) * C)
    return row.expand(images, -1, -1).flatten(), (share + image).flatten()


def _sums_of_prompts(selected: Tensor, prompts: Tensor, shares: Tensor, row: Tensor, share: Tensor, P: int) -> Tensor:
    """For every patch of a tile (images, P, D): the weighted sum of the prompts (rows, D) that selected it."""
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
        per_sample_weights=shares.index_select(0, share.index_select(0, order)),
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

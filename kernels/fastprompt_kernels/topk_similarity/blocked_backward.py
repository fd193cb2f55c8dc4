"""The backward pass of topk_similarity on processors: products with sparse matrices of what was selected.

A value's gradient goes to k of P patches in equal shares, so the gradient of the similarity is a matrix of few entries.
For the gradient of the prompts they lie in the right order already; for that of the patches they are sorted. Torch's
threads share the products; threads of ours, each with images of its own, were no faster: they meet at Python's lock.
"""

import warnings
from functools import cache, partial
from itertools import product

import numpy as np
import torch
from torch import Tensor

from ..cores import parts, scratch_memory
from .dense import Scales

# Bytes of the features that one product reads: most of a core's second-level cache.
FEATURE_BYTES = 7 * 2**18
# The most selected patches of one product.
ENTRIES = 2**15


def backward(
    grad: Tensor, patches: Tensor | None, prompts: Tensor | None, selected: Tensor, k: Scales, P: int
) -> tuple[Tensor, Tensor]:
    """The gradients (B, P, D) and (N, C, D) in the inputs' dtype, from that of the values (B, N, C).

    Each needs the other input. Where that is None the gradient is not made, and is (0,).
    """
    shares, of_patches, of_prompts = _shares(grad, k), grad.new_empty(0), grad.new_empty(0)
    _announce_sparse_matrices()
    entries = max(ENTRIES, selected.shape[2])
    scratch = scratch_memory(entries, torch.int32), scratch_memory(entries, grad.dtype)
    if patches is not None:
        of_prompts = _grad_prompts(shares, patches, selected, k, *scratch)
    if prompts is not None:
        of_patches = _grad_patches(shares, prompts.to(grad.dtype), selected, k, P, *scratch)
    dtype = prompts.dtype if patches is None else patches.dtype
    return of_patches.to(dtype), of_prompts.to(dtype)


def _grad_patches(
    shares: Tensor, prompts: Tensor, selected: Tensor, k: Scales, P: int, rows: Tensor, weights: Tensor
) -> Tensor:
    """(B, P, D)."""
    (N, C, D), B, W = prompts.shape, len(shares), selected.shape[2]
    result = shares.new_empty(B, P, D) if C else shares.new_zeros(B, P, D)
    classes_at_once = max(1, min(C, FEATURE_BYTES // (2 * N * D * shares.itemsize), ENTRIES // W))
    images_at_once = ENTRIES // (classes_at_once * W)
    entries = cache(partial(_entries, k, C))
    for images, classes in product(parts(B, images_at_once), parts(C, classes_at_once)):
        tile, total = selected[images, classes], result[images].flatten(0, 1)
        # The first row and share of the tile are those of its first class; the others lie relative to them.
        features, own = prompts.flatten(0, 1)[classes.start :], shares[images].flatten()[classes.start :]
        matrix = _of_patches(tile, own, *entries(*tile.shape[:2]), rows, weights, (len(total), len(features)))
        torch.addmm(total, matrix, features, beta=int(classes.start > 0), out=total)
    return result


def _grad_prompts(
    shares: Tensor, patches: Tensor, selected: Tensor, k: Scales, columns: Tensor, weights: Tensor
) -> Tensor:
    """(N, C, D). There is nothing to sort."""
    (B, P, D), N, C = patches.shape, len(k), shares.shape[2]
    result = shares.new_empty(N, C, D) if B else shares.new_zeros(N, C, D)
    largest = max(map(sum, k))
    images_at_once = max(1, min(FEATURE_BYTES // (P * D * shares.itemsize), ENTRIES // largest))
    classes_at_once = ENTRIES // (images_at_once * largest)
    for images in parts(B, images_at_once):
        features = patches[images].to(shares.dtype).flatten(0, 1)
        for classes, n in product(parts(C, classes_at_once), range(N)):
            matrix = _of_prompt(selected[images, classes], shares[images, :, classes], k, n, P, columns, weights)
            torch.addmm(result[n, classes], matrix, features, beta=int(images.start > 0), out=result[n, classes])
    return result


def _shares(grad: Tensor, k: Scales) -> Tensor:
    """(B, N * S, C): what every selected patch receives of the gradient of a value."""
    return torch.stack([grad[:, n] / (scale * len(k[n])) for n, scale in _levels(k)], dim=1)


def _levels(k: Scales) -> list[tuple[int, int]]:
    """For every scale of every prompt: the prompt and the scale."""
    return [(n, scale) for n, scales in enumerate(k) for scale in scales]


def _entries(k: Scales, C: int, images: int, classes: int) -> tuple[Tensor, Tensor]:
    """For every entry of `selected` in a tile: the row of its prompt in (N * C, D), and the place of its share in
    (images, N * S, C), for the first classes.
    """
    levels, every_class = _levels(k), torch.arange(classes, dtype=torch.int32)[:, None]
    counts = [scale for _, scale in levels]
    row = torch.from_numpy(np.repeat([n * C for n, _ in levels], counts).astype(np.int32)) + every_class
    share = torch.from_numpy(np.repeat(np.arange(len(levels)) * C, counts).astype(np.int32)) + every_class
    image = torch.arange(images, dtype=torch.int32)[:, None, None] * (len(levels) * C)
    return row.expand(images, -1, -1).flatten(), (share + image).flatten()


def _of_patches(
    selected: Tensor, shares: Tensor, row: Tensor, share: Tensor, rows: Tensor, weights: Tensor, size: tuple[int, int]
) -> Tensor:
    """The sparse matrix of a tile that sums for every patch the prompts that selected it, in scratch memory."""
    count, patches = selected.numel(), size[0]
    keys, rows, weights = torch.empty_like(selected, dtype=torch.int32), rows[:count], weights[:count]
    torch.add(selected, torch.arange(0, patches, patches // len(selected))[:, None, None], out=keys)
    if patches < 2**15:
        keys = keys.short()  # for which numpy counts instead of comparing
    # The order is stable, so a patch's prompts are added in the same order whatever images come with it.
    order = torch.from_numpy(keys.flatten().numpy().argsort(kind="stable"))
    starts = torch.zeros(patches + 1, dtype=torch.int32)
    torch.cumsum(torch.bincount(keys.flatten(), minlength=patches), 0, dtype=torch.int32, out=starts[1:])
    torch.index_select(share, 0, order, out=rows)
    torch.index_select(shares, 0, rows, out=weights)
    torch.index_select(row, 0, order, out=rows)
    return torch.sparse_csr_tensor(starts, rows, weights, size, check_invariants=False)


def _of_prompt(selected: Tensor, shares: Tensor, k: Scales, n: int, P: int, columns: Tensor, weights: Tensor) -> Tensor:
    """The sparse matrix (classes, images * P) that sums for every class of a prompt the patches that it selected, in
    scratch memory.
    """
    (images, classes, _), S, start, count = selected.shape, len(k[n]), sum(map(sum, k[:n])), sum(k[n])
    size = classes, images, count
    columns, weights = columns[: classes * images * count], weights[: classes * images * count]
    image = torch.arange(0, images * P, P, dtype=torch.int32)[:, None]
    torch.add(selected[:, :, start : start + count].transpose(0, 1), image, out=columns.view(size))
    own = shares[:, n * S : (n + 1) * S, :, None].permute(2, 0, 1, 3).split(1, dim=2)
    for part, share in zip(weights.view(size).split(list(k[n]), dim=2), own, strict=True):
        part.copy_(share.squeeze(2))
    starts = torch.arange(0, classes * images * count + 1, images * count, dtype=torch.int32)
    return torch.sparse_csr_tensor(starts, columns, weights, (classes, images * P), check_invariants=False)


@cache
def _announce_sparse_matrices() -> None:
    """Torch says once a process that sparse matrices may still change; users of this library need not hear it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)

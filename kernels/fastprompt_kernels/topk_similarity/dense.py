"""topk_similarity in plain torch, on the dense similarity of some images at a time, for any device.

Torch's own threads share every operation. Its gradients are the fastest on a processor where a product has few rows, or
a large part of the similarity is selected.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..cores import exact_bfloat16_products, parts, products

# Bytes of the similarities of the images that are held at a time. Memory beyond it comes fresh from the system in every
# call, which costs up to 12 %; with a quarter of it, torch's threads have too little to share.
CHUNK_BYTES = 2**24

Scales = Sequence[Sequence[int]]


def saved_size(B: int, P: int, C: int, k: Scales) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of what is kept for the backward pass: the selected patches, scale after scale."""
    dtype = torch.uint8 if P <= 2**8 else torch.int16 if P <= 2**15 else torch.int32
    return (B, C, sum(map(sum, k))), dtype


def forward(patches: Tensor, prompts: Tensor, k: Scales, keep: bool) -> tuple[Tensor, Tensor]:
    """Values (B, N, C) and, with keep, the selected patches as `saved_size` says, scale after scale.

    Args:
        patches: (B, P, D).
        prompts: (N, C, D).
        k: for every prompt its S scales, each from 1 to P.
        keep: whether the selected patches are wanted; without it they are (0,).
    """
    (B, P, _), (N, C, _) = patches.shape, prompts.shape
    dtype = torch.promote_types(patches.dtype, torch.float32)
    size, kind = saved_size(B, P, C, k)
    values = torch.empty(B, N, C, dtype=dtype, device=patches.device)
    selected = torch.empty(size if keep else 0, dtype=kind, device=patches.device)
    queries = prompts.flatten(0, 1).to(dtype)
    with exact_bfloat16_products(patches):
        for images in _chunks(B, N * C * P * dtype.itemsize):
            # A product an image, so that an image's results do not depend on the others in its batch. Not matmul, which
            # would make one product of all, or not, depending on whether a gradient is asked for.
            rows = patches[images].to(dtype)
            scores = rows.new_empty(len(rows), N * C, P)
            products(queries.expand(len(rows), -1, -1), rows.mT, out=scores)
            scores = scores.unflatten(1, (N, C))
            start = 0
            for n, scales in enumerate(k):
                best, patch = _best(scores[:, n], scales, exact=keep)
                values[images, n] = sum(best[..., :scale].mean(-1) for scale in scales) / len(scales)
                for scale in scales if keep else ():
                    selected[images, :, start : start + scale] = patch[..., :scale]
                    start += scale
    return values, selected


def backward(
    grad: Tensor, patches: Tensor | None, prompts: Tensor | None, selected: Tensor, k: Scales, P: int
) -> tuple[Tensor, Tensor]:
    """The gradients (B, P, D) and (N, C, D) in the inputs' dtype, from that of the values (B, N, C).

    Each needs the other input. Where that is None the gradient is not made, and is (0,).
    """
    B, N, C = grad.shape
    like = prompts if patches is None else patches
    of_patches = grad.new_empty((B, P, like.shape[-1]) if prompts is not None else 0)
    of_prompts = grad.new_zeros((N * C, like.shape[-1]) if patches is not None else 0)
    queries = None if prompts is None else prompts.flatten(0, 1).to(grad.dtype)
    for images in _chunks(B, N * C * P * grad.itemsize):
        weights = _weights(grad[images], selected[images], k, P)  # (N * C, images, P)
        if prompts is not None:
            rows = weights.permute(1, 2, 0)
            products(rows, queries.expand(len(rows), -1, -1), out=of_patches[images])
        if patches is not None:
            of_prompts.addmm_(weights.flatten(1), patches[images].flatten(0, 1).to(grad.dtype))
    of_prompts = of_prompts.view((N, C, like.shape[-1]) if patches is not None else 0)
    return of_patches.to(like.dtype), of_prompts.to(like.dtype)


def _chunks(B: int, bytes_per_image: int) -> Iterator[slice]:
    return parts(B, CHUNK_BYTES // max(1, bytes_per_image))


def _best(scores: Tensor, scales: Sequence[int], exact: bool) -> tuple[Tensor, Tensor]:
    """The largest entries of every row and their places, in descending order if there are several scales.

    Which of equals topk takes is left open; where exact, it is the first of them.
    """
    P, largest, several = scores.shape[-1], max(scales), len(scales) > 1
    exact = exact and min(scales) < P
    best, patch = scores.topk(min(largest + exact, P), sorted=several)
    if not exact:
        return best, patch
    if several:
        edges = [(best[..., scale - 1], best[..., scale]) for scale in scales if scale < P]
    else:
        # The smallest of one more than are wanted gives its place to the last, and is compared with the others.
        after, place = best.min(-1, keepdim=True)
        best, patch = (part.scatter(-1, place, part[..., -1:])[..., :-1] for part in (best, patch))
        edges = [(best.amin(-1), after[..., 0])]
    # Not-a-number is among the largest and greater than nothing, so it makes a row unsure as equals do.
    unsure = torch.stack([~(last > following) for last, following in edges]).any(0)
    if unsure.any():
        ranked = scores[unsure].sort(dim=-1, descending=True, stable=True)
        best[unsure], patch[unsure] = (part[:, : best.shape[-1]] for part in ranked)
    return best, patch


def _weights(grad: Tensor, selected: Tensor, k: Scales, P: int) -> Tensor:
    """The gradient of the similarity of some images, (N * C, images, P)."""
    images, N, C = grad.shape
    weights, start = grad.new_zeros(N, C, images, P), 0
    for n, scales in enumerate(k):
        for scale in scales:
            share = grad[:, n].mT[..., None] / (scale * len(scales))
            patch = selected[:, :, start : start + scale].transpose(0, 1).long()
            weights[n].scatter_add_(2, patch, share.expand_as(patch))
            start += scale
    return weights.flatten(0, 1)

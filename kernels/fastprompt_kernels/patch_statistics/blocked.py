"""patch_statistics in plain torch with bounded memory and its own backward, for any device.

The logits are made one tile (some images, some classes) at a time, in memory that is taken once. The statistics of
the tiles of classes are merged: the largest logit, the sum of the exponentials of the differences to it, and the sum of
these times the differences. Torch's own threads share every operation: most of the time goes to the matrix products.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cores import parts, products

# Bytes of the largest tile of logits: forward, where it stays in the caches from one operation to the next, and
# backward, where the products sum over more rows at once.
TILE_BYTES = 3 * 2**20
GRAD_TILE_BYTES = 8 * 2**20
# Bytes of the logits of all images up to which they are kept for the backward pass, which saves a product in four.
KEPT_BYTES = 2**24
# Stands for a difference of minus infinity, whose product with its exponential, 0, would not be a number.
LOWEST = -1e30

# Largest logit, sum of exponentials, weighted sum, class of the largest logit; the last two None if not asked for
Sums = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def kept_shape(B: int, P: int, C: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Shape of the logits that are kept for the backward pass: all of them, or none where they are too many."""
    return (B, P, C) if B * P * C * dtype.itemsize <= KEPT_BYTES else (0,)


def forward(
    patches: Tensor, prompts: Tensor, scale: float, labels: Tensor | None, entropy: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The statistics.

    Args:
        patches: (B, P, D).
        prompts: (C, D).
        scale: of the logits.
        labels: (B,) integers, or None.
        entropy: whether the entropy is wanted; the backward pass needs it.
        keep: whether the backward pass is wanted.

    Returns:
        maximum, logsumexp and entropy (B, P) in float32 (float64 for float64 inputs), the last (0,) where it is not
        wanted; rank (B, P) int64, (0,) without labels; largest (B, P) int32, the class of the maximum, (0,) without
        keep; the logits as `kept_shape` says, (0,) without keep.
    """
    (B, P, _), C, dtype = patches.shape, len(prompts), torch.promote_types(patches.dtype, torch.float32)
    kept = patches.new_empty(kept_shape(B, P, C, dtype) if keep else 0, dtype=dtype)
    prompts = prompts.to(dtype)
    chunks, tiles = _tiles(patches, prompts, TILE_BYTES)
    # One tile each for logits that are still needed, for differences and for their exponentials if both are.
    count = (labels is not None or keep) + 1 + entropy
    memory = _memory(prompts, chunks[0], P, tiles[0], count)
    found = []
    for images in chunks:
        own_labels = None if labels is None else labels[images]
        own_kept = kept[images] if kept.ndim == 3 else None
        rows = patches[images].to(dtype)
        found.append(_of_images(rows, prompts, tiles, scale, own_labels, entropy, keep, own_kept, memory))
    *statistics, rank, largest = found[0] if len(found) == 1 else map(torch.cat, zip(*found, strict=True))
    return *statistics, rank, largest, kept


def _of_images(
    rows: Tensor, prompts: Tensor, tiles: Sequence[slice], scale: float, labels: Tensor | None, entropy: bool,
    keep: bool, kept: Tensor | None, memory: Sequence[Tensor],
) -> tuple[Tensor, ...]:  # fmt: skip
    """What `forward` returns, but for the logits, which are written into kept (images, P, C) where that is given."""
    sums, own, rank, largest = None, None, rows.new_empty(0, dtype=torch.int64), rows.new_empty(0, dtype=torch.int32)
    for classes in tiles:
        logits = _logits(rows, prompts[classes], scale, memory[0] if kept is None else kept[..., classes])
        of_tile = _sums(logits, classes.start, keep, memory[-2:] if entropy else memory[-1:])
        sums = of_tile if sums is None else _merged(sums, of_tile)
        if labels is not None:
            place, inside = _within(labels[:, None].expand(rows.shape[:2]), classes)
            found = logits.gather(-1, place[..., None]).squeeze(-1)
            own = found if own is None else torch.where(inside, found, own)
    if labels is not None:
        rank = _before(logits, own, labels, tiles[-1])  # the last tile is still at hand
        for classes in tiles[:-1]:
            logits = _logits(rows, prompts[classes], scale, memory[0]) if kept is None else kept[..., classes]
            rank += _before(logits, own, labels, classes)
    peak, total, weighted, first = sums
    if keep:
        largest = first.int()
    logarithm = total.log()
    spread = logarithm - weighted / total if entropy else rows.new_empty(0)
    return peak, peak + logarithm, spread, rank, largest


def backward(
    grads: Sequence[Tensor],
    patches: Tensor,
    prompts: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    largest: Tensor,
    kept: Tensor,
    scale: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of patches and prompts, from those of maximum, logsumexp and entropy, each (B, P).

        d logits[c] = p[c] * (d logsumexp - d entropy * (log p[c] + entropy)) + d maximum * [c = largest]

    Args:
        grads: of maximum, logsumexp and entropy.
        patches: (B, P, D).
        prompts: (C, D).
        logsumexp: (B, P), from the forward pass, as are entropy and largest.
        entropy: (B, P).
        largest: (B, P) int32.
        kept: the logits (B, P, C), or (0,) if they are to be made again.
        scale: of the logits.
        wanted: whether the gradient of the patches and that of the prompts is wanted.

    Returns:
        (B, P, D) and (C, D) in the inputs' dtype; (0,) for a gradient that is not wanted.
    """
    dtype, P = logsumexp.dtype, patches.shape[1]
    of_patches = patches.new_empty(patches.shape if wanted[0] else 0, dtype=dtype)
    of_prompts = prompts.new_zeros(prompts.shape if wanted[1] else 0, dtype=dtype)
    texts = prompts.to(dtype)
    chunks, tiles = _tiles(patches, texts, GRAD_TILE_BYTES)
    memory = _memory(texts, chunks[0], P, tiles[0], 2)
    for images in chunks:
        rows, statistics = patches[images].to(dtype), (logsumexp[images], entropy[images], largest[images])
        own_grads = [grad[images] * scale for grad in grads]
        for classes in tiles:
            own, first = texts[classes], classes.start == 0
            logits = kept[images, :, classes] if kept.ndim == 3 else _logits(rows, own, scale, memory[0])
            weights = _logit_grad(logits, own_grads, statistics, classes, memory)
            if wanted[0]:
                matrix, target = own.expand(len(rows), -1, -1), of_patches[images]
                products(weights, matrix, out=target, beta=0 if first else 1)
            if wanted[1]:
                of_prompts[classes].addmm_(weights.flatten(0, 1).mT, rows.flatten(0, 1))
    return of_patches.to(patches.dtype), of_prompts.to(prompts.dtype)


def _tiles(patches: Tensor, prompts: Tensor, largest: int) -> tuple[list[slice], list[slice]]:
    """Cut images and classes so that a tile of whole images stays within so many bytes (one class at least).

    The classes are cut in the same places whatever the number of images, so that the result for an image does not
    depend on the others.
    """
    (B, P, _), C = patches.shape, len(prompts)
    cells = max(1, largest // (P * prompts.itemsize))
    classes = min(cells, C)
    return list(parts(B, cells // classes)) or [slice(0, 0)], [
        slice(c, min(c + classes, C)) for c in range(0, C, classes)
    ]


def _memory(like: Tensor, images: slice, P: int, classes: slice, count: int) -> list[Tensor]:
    """Room for some tiles of logits (images, P, classes), none of which is larger than the first."""
    size = images.stop - images.start, P, classes.stop - classes.start
    return [like.new_empty(size) for _ in range(count)]


def _part(memory: Tensor, like: Tensor) -> Tensor:
    """As much of it as a smaller tile needs."""
    return memory[: len(like), :, : like.shape[-1]]


def _logits(rows: Tensor, prompts: Tensor, scale: float, memory: Tensor) -> Tensor:
    """(images, P, classes), in the first part of the memory.

    Image by image: matmul would make one product of all rows, rounded differently for another number of images.
    The scale comes last: in the product it would set equal sums of different terms apart.
    """
    logits = memory[: len(rows), :, : len(prompts)]
    products(rows, prompts.mT.expand(len(rows), -1, -1), out=logits)
    return logits if scale == 1 else logits.mul_(scale)


def _sums(logits: Tensor, start: int, keep: bool, memory: Sequence[Tensor]) -> Sums:
    """What there is to know of a tile of logits whose first class is `start`; they may lie in the first memory.

    With one memory only, there is no weighted sum.
    """
    if keep:
        peak, first = logits.max(-1)  # the first of several equal ones
        first += start
    else:
        peak, first = logits.amax(-1), None
    difference = torch.sub(logits, _finite(peak)[..., None], out=_part(memory[0], logits))
    if len(memory) == 1:
        return peak, difference.exp_().sum(-1), None, first
    terms = torch.exp(difference, out=_part(memory[1], logits))
    # Only minus infinity times its exponential, 0, is left out: of what is no number before, the total is none.
    return peak, terms.sum(-1), terms.mul_(difference).nansum(-1), first


def _merged(left: Sums, right: Sums) -> Sums:
    """The sums over the classes of both."""
    peak = torch.maximum(left[0], right[0])
    total, weighted = 0, None if left[2] is None else 0
    for own, own_total, own_weighted, _ in (left, right):
        shift = (own - _finite(peak)).clamp_min_(LOWEST)
        factor = shift.exp()
        total = total + factor * own_total
        if weighted is not None:
            weighted = weighted + factor * (own_weighted + own_total * shift)
    first = None if left[3] is None else torch.where(right[0] > left[0], right[3], left[3])
    return peak, total, weighted, first


def _finite(peak: Tensor) -> Tensor:
    """Not minus infinity, to which a difference may be no number."""
    return peak.clamp_min(torch.finfo(peak.dtype).min)


def _logit_grad(
    logits: Tensor, grads: Sequence[Tensor], statistics: Sequence[Tensor], classes: slice, memory: Sequence[Tensor]
) -> Tensor:
    """The gradient of a tile of logits, which may lie in the first memory."""
    of_maximum, of_logsumexp, of_entropy = grads
    logsumexp, entropy, largest = statistics
    logarithm, weights = (_part(room, logits) for room in memory)
    torch.sub(logits, logsumexp[..., None], out=logarithm)
    torch.exp(logarithm, out=weights)
    logarithm.mul_(-of_entropy[..., None]).add_((of_logsumexp - of_entropy * entropy)[..., None])
    weights.mul_(logarithm)
    place, inside = _within(largest, classes)
    return weights.scatter_add_(-1, place[..., None], (of_maximum * inside)[..., None])


def _within(index: Tensor, classes: slice) -> tuple[Tensor, Tensor]:
    """Where classes lie in a tile of them, and whether they do; those that do not are given some place in it."""
    inside = (index >= classes.start) & (index < classes.stop)
    return (index - classes.start).clamp(0, classes.stop - classes.start - 1).long(), inside


def _before(logits: Tensor, own: Tensor, labels: Tensor, classes: slice) -> Tensor:
    """How many classes of a tile stand before the label's, whose logit is own (images, P)."""
    lower = torch.arange(classes.start, classes.stop, device=labels.device) < labels[:, None, None]
    return torch.where(lower, logits >= own[..., None], logits > own[..., None]).sum(-1)

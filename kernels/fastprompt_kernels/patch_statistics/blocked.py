"""patch_statistics in plain torch with bounded memory and its own backward, for any device.

The logits are made one tile (some images, some classes) at a time, forward and backward. The statistics are carried
from one tile of classes to the next: the largest logit so far, the sum of the exponentials of the differences to it,
and the sum of these times the differences.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

# The largest tile of logits. With whatever is made of it, it fits the second-level cache of server processors.
TILE_BYTES = 2 * 2**20
# Stands for a difference of minus infinity, whose product with its exponential, 0, would not be a number.
LOWEST = -1e30


def forward(
    patches: Tensor, prompts: Tensor, scale: float, labels: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The statistics.

    Args:
        patches: (B, P, D).
        prompts: (C, D).
        scale: of the logits.
        labels: (B,) integers, or None.
        keep: whether the backward pass is wanted.

    Returns:
        maximum, logsumexp and entropy (B, P) in float32 (float64 for float64 inputs); rank (B, P) int64, (0,) without
        labels; largest (B, P) int32, the class of the maximum, (0,) without keep.
    """
    (B, P, _), dtype = patches.shape, torch.promote_types(patches.dtype, torch.float32)
    results = [torch.empty(B, P, dtype=dtype, device=patches.device) for _ in range(3)]
    results.append(torch.empty((B, P) if labels is not None else 0, dtype=torch.int64, device=patches.device))
    results.append(torch.empty((B, P) if keep else 0, dtype=torch.int32, device=patches.device))
    prompts = prompts.to(dtype)
    for images, tiles in _tiles(patches, prompts):
        own_labels = None if labels is None else labels[images]
        parts = _of_images(patches[images].to(dtype), prompts, tiles, scale, own_labels, keep)
        for result, part in zip(results, parts, strict=True):
            if part is not None:
                result[images] = part
    return tuple(results)


def _of_images(
    rows: Tensor, prompts: Tensor, tiles: Sequence[slice], scale: float, labels: Tensor | None, keep: bool
) -> tuple[Tensor | None, ...]:
    """What `forward` returns, for as many images as a tile holds; None for what is not asked for."""
    state, rank = _start(rows), None
    own = rows.new_full(rows.shape[:2], -torch.inf)
    for classes in tiles:
        logits = _logits(rows, prompts[classes], scale)
        state = _extend(state, logits, classes.start, keep)
        if labels is not None:
            place, inside = _within(labels[:, None].expand(own.shape), classes)
            own = torch.where(inside, logits.gather(-1, place[..., None]).squeeze(-1), own)
    if labels is not None:
        rank = _before(logits, own, labels, tiles[-1])  # the last tile is still at hand
        for classes in tiles[:-1]:
            rank += _before(_logits(rows, prompts[classes], scale), own, labels, classes)
    peak, total, weighted, first = state
    logarithm = total.log()
    maximum = torch.where(total > 0, peak, logarithm)
    return maximum, peak + logarithm, logarithm - weighted / total, rank, first if keep else None


def backward(
    grads: Sequence[Tensor],
    patches: Tensor,
    prompts: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    largest: Tensor,
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
        scale: of the logits.
        wanted: whether the gradient of the patches and that of the prompts is wanted.

    Returns:
        (B, P, D) and (C, D) in the inputs' dtype; (0,) for a gradient that is not wanted.
    """
    dtype = logsumexp.dtype
    of_patches = torch.empty(patches.shape if wanted[0] else 0, dtype=dtype, device=patches.device)
    of_prompts = torch.zeros(prompts.shape if wanted[1] else 0, dtype=dtype, device=patches.device)
    texts = prompts.to(dtype)
    for images, tiles in _tiles(patches, texts):
        rows = patches[images].to(dtype)
        scaled = [scale * grad[images] for grad in grads]
        for classes in tiles:
            logits = _logits(rows, texts[classes], scale)
            weights = _logit_grad(logits, scaled, logsumexp[images], entropy[images])
            place, inside = _within(largest[images], classes)
            weights.scatter_add_(-1, place[..., None], (scaled[0] * inside)[..., None])
            if wanted[0]:
                matrix, kept = texts[classes].expand(len(rows), -1, -1), int(classes.start > 0)
                torch.baddbmm(of_patches[images], weights, matrix, beta=kept, out=of_patches[images])
            if wanted[1]:
                of_prompts[classes].addmm_(weights.flatten(0, 1).mT, rows.flatten(0, 1))
    return of_patches.to(patches.dtype), of_prompts.to(prompts.dtype)


def _tiles(patches: Tensor, prompts: Tensor) -> list[tuple[slice, list[slice]]]:
    """Cut images x classes so that a tile of whole images stays within TILE_BYTES (one class at least).

    The classes are cut in the same places whatever the number of images, so that the result for an image does not
    depend on the others.
    """
    (B, P, _), C = patches.shape, len(prompts)
    cells = max(1, TILE_BYTES // (P * prompts.itemsize))
    classes = min(cells, C)
    images = cells // classes
    per_image = [slice(c, min(c + classes, C)) for c in range(0, C, classes)]
    return [(slice(b, b + images), per_image) for b in range(0, B, images)]


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """Rows (images, P, X) times one matrix (X, Y), image by image.

    Not matmul, which would make one product of all rows, rounded differently for another number of images.
    """
    return torch.bmm(rows, matrix.expand(len(rows), -1, -1))


def _logits(rows: Tensor, prompts: Tensor, scale: float) -> Tensor:
    """(images, P, classes)."""
    return _product(rows, prompts.mT).mul_(scale)


def _start(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What is carried from tile to tile, (images, P) each, before the first tile."""
    zeros = rows.new_zeros(rows.shape[:2])
    # Not minus infinity, to which a difference may be no number.
    return zeros + torch.finfo(rows.dtype).min, zeros, zeros, zeros.long()


def _extend(
    state: tuple[Tensor, Tensor, Tensor, Tensor], logits: Tensor, start: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The state after a tile of logits whose first class is `start`."""
    peak, total, weighted, first = state
    if keep:
        highest, here = logits.max(-1)  # the first of several equal ones
        first = torch.where(highest > peak, start + here, first)
    else:
        highest = logits.amax(-1)  # three times as fast
    highest = torch.maximum(peak, highest)
    shift = (peak - highest).clamp_min_(LOWEST)
    kept = shift.exp()
    difference = (logits - highest[..., None]).clamp_min_(LOWEST)
    terms = difference.exp()
    weighted = kept * (weighted + total * shift) + difference.mul_(terms).sum(-1)
    return highest, kept * total + terms.sum(-1), weighted, first


def _logit_grad(logits: Tensor, grads: Sequence[Tensor], logsumexp: Tensor, entropy: Tensor) -> Tensor:
    """The gradient of a tile of logits, which are overwritten, but for the one of the maximum."""
    _, of_logsumexp, of_entropy = (grad[..., None] for grad in grads)
    logits.sub_(logsumexp[..., None])
    probability = logits.exp()
    return probability.mul_(logits.add_(entropy[..., None]).mul_(-of_entropy).add_(of_logsumexp))


def _within(index: Tensor, classes: slice) -> tuple[Tensor, Tensor]:
    """Where classes lie in a tile of them, and whether they do; those that do not are given some place in it."""
    inside = (index >= classes.start) & (index < classes.stop)
    return (index - classes.start).clamp(0, classes.stop - classes.start - 1).long(), inside


def _before(logits: Tensor, own: Tensor, labels: Tensor, classes: slice) -> Tensor:
    """How many classes of a tile stand before the label's, whose logit is own (images, P)."""
    lower = torch.arange(classes.start, classes.stop, device=labels.device) < labels[:, None, None]
    return torch.where(lower, logits >= own[..., None], logits > own[..., None]).sum(-1)

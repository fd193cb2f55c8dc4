"""topk_similarity in plain torch with bounded memory and its own backward, for any device.

The similarity is made one tile (some images, one prompt, some classes) at a time. What is kept for the backward pass is
one bit per patch and scale: bit p % 32 of word p // 32 says whether patch p was selected.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# The largest tile of the similarity: it fits the second-level cache of server processors together with what is made of
# it. With 1, 4 and 16 MiB, 32 images, 196 patches and 4 x 397 prompts took the same time, forward and backward.
TILE_BYTES = 4 * 2**20


def forward(patches: Tensor, prompts: Tensor, k: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """The values and the packed selection.

    Args:
        patches: (B, P, D).
        prompts: (N, C, D).
        k: for every prompt its S scales, each from 1 to P.

    Returns:
        values (B, N, C) in float32 (float64 for float64 inputs) and selected (B, N * S, C, ceil(P / 32)) int32.
    """
    (B, P, _), (N, C, _), S = patches.shape, prompts.shape, len(k[0])
    dtype = torch.promote_types(patches.dtype, torch.float32)
    values = torch.empty(B, N, C, dtype=dtype, device=patches.device)
    selected = torch.zeros(B, N * S, C, -(-P // 32), dtype=torch.int32, device=patches.device)
    for images, classes in _tiles(B, C, P * dtype.itemsize):
        keys = patches[images].to(dtype).mT
        for n, scales in enumerate(k):
            # Not matmul, which picks its method by whether an input requires a gradient: compiled code knows none.
            scores = torch.bmm(prompts[n, classes].to(dtype).expand(len(keys), -1, -1), keys)  # (images, classes, P)
            top, order = _largest(scores, scales)
            values[images, n, classes] = sum(top[..., :scale].mean(-1) for scale in scales) / S
            for level, scale in enumerate(scales, start=n * S):
                chosen = order[..., :scale]
                bit = torch.ones((), dtype=torch.int32, device=order.device) << (chosen % 32).int()
                selected[images, level, classes].scatter_add_(-1, chosen // 32, bit)
    return values, selected


def grad_patches(grad: Tensor, prompts: Tensor, selected: Tensor, k: Sequence[Sequence[int]], P: int) -> Tensor:
    """The gradient (B, P, D) in the inputs' dtype, from that of the values (B, N, C)."""
    (B, N, C), D = grad.shape, prompts.shape[2]
    result = torch.zeros(B, P, D, dtype=grad.dtype, device=grad.device)
    for images, classes in _tiles(B, C, N * P * grad.itemsize):
        weights = _weights(grad, selected, k, images, classes, P).flatten(0, 1)
        result[images] += (weights @ prompts[:, classes].to(grad.dtype).flatten(0, 1)).view(-1, P, D)
    return result.to(prompts.dtype)


def grad_prompts(grad: Tensor, patches: Tensor, selected: Tensor, k: Sequence[Sequence[int]]) -> Tensor:
    """The gradient (N, C, D) in the inputs' dtype, from that of the values (B, N, C)."""
    (B, P, D), (_, N, C) = patches.shape, grad.shape
    result = torch.zeros(N, C, D, dtype=grad.dtype, device=grad.device)
    for images, classes in _tiles(B, C, N * P * grad.itemsize):
        weights = _weights(grad, selected, k, images, classes, P).flatten(0, 1)
        result[:, classes] += (weights.mT @ patches[images].to(grad.dtype).flatten(0, 1)).view(N, -1, D)
    return result.to(patches.dtype)


def _tiles(B: int, C: int, bytes_per_row: int) -> Iterator[tuple[slice, slice]]:
    """Cut images x classes so that a tile of whole patch rows stays within TILE_BYTES (one row at least)."""
    rows = max(1, TILE_BYTES // bytes_per_row)
    classes = min(rows, max(C, 1))
    images = max(1, rows // classes)
    for b in range(0, B, images):
        for c in range(0, C, classes):
            yield slice(b, b + images), slice(c, c + classes)


def _largest(scores: Tensor, scales: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The largest scores and their patches in descending order, the lowest patch first among equal ones.

    torch.topk takes any of several equal scores. That matters only where the last score that a scale takes equals the
    first that it leaves: those rows, rare in practice, are sorted again with a stable sort.
    """
    k, P = max(scales), scores.shape[-1]
    top, order = scores.topk(min(k + 1, P), dim=-1)
    ends = [scale for scale in scales if scale < P]
    tied = (top[..., [end - 1 for end in ends]] == top[..., ends]).any(-1)
    if tied.any():
        order[tied] = scores[tied].argsort(dim=-1, descending=True, stable=True)[..., : order.shape[-1]]
    return top, order


def _weights(
    grad: Tensor, selected: Tensor, k: Sequence[Sequence[int]], images: slice, classes: slice, P: int
) -> Tensor:
    """The gradient of the similarity of one tile, (images, P, N * classes): one matrix for the products to come."""
    S, patch = len(k[0]), torch.arange(P, device=grad.device)
    shift = (patch % 32).int()[:, None]
    per_prompt = []
    for n, scales in enumerate(k):
        weights = 0
        for level, scale in enumerate(scales, start=n * S):
            words = selected[images, level, classes].mT[:, patch // 32]
            weights = weights + (words >> shift & 1) * (grad[images, n, None, classes] / (scale * S))
        per_prompt.append(weights)
    return torch.cat(per_prompt, dim=-1)

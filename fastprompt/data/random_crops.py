"""The random crops and flips of training."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CROP_AREA = (0.08, 1.0)  # share of the picture, uniform
CROP_RATIO = (3 / 4, 4 / 3)  # width over height, log-uniform
CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class RandomCrops:
    """What is drawn for a batch: the augmentation of CoOp and GalLoP, before crops are resized.

    Attributes:
        boxes: (B, 4) int64: top, left, height and width of a box of 8 % to 100 % of the picture's area.
        flips: (B,) bool: whether it is mirrored, with probability one half.
    """

    boxes: Tensor
    flips: Tensor


def draw_crops(sizes: Tensor, generator: torch.Generator) -> RandomCrops:
    """Draw a crop and a flip for every image, as torchvision's RandomResizedCrop and RandomHorizontalFlip.

    One seed an image is drawn from the generator before anything else, so that the draw for an image does not depend
    on the sizes of those before it.

    Args:
        sizes: (B, 2) int64: height and width.
        generator: Source of all randomness.
    """
    seeds = torch.randint(2**62, (len(sizes),), generator=generator, device=generator.device).tolist()
    return seeded_crops(sizes, seeds)


def seeded_crops(sizes: Tensor, seeds: list[int]) -> RandomCrops:
    """Crops and flips from one seed an image; see ``draw_crops``."""
    boxes = torch.empty(len(sizes), 4, dtype=torch.int64)
    flips = torch.empty(len(sizes), dtype=torch.bool)
    for i, ((height, width), seed) in enumerate(zip(sizes.tolist(), seeds, strict=True)):
        own = torch.Generator().manual_seed(seed)
        boxes[i] = torch.tensor(_crop_box(height, width, own))
        flips[i] = torch.rand(1, generator=own).item() < 0.5
    return RandomCrops(boxes, flips)


def _crop_box(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) as torchvision's RandomResizedCrop, which can draw from the global RNG only."""
    log_ratio = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    for _ in range(CROP_ATTEMPTS):
        area = height * width * torch.empty(1).uniform_(*CROP_AREA, generator=generator).item()
        ratio = torch.empty(1).uniform_(*log_ratio, generator=generator).exp().item()
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(height - h + 1, (1,), generator=generator))
            left = int(torch.randint(width - w + 1, (1,), generator=generator))
            return top, left, h, w
    # Very long or very tall pictures: the largest centred box whose ratio is allowed.
    ratio = min(max(width / height, CROP_RATIO[0]), CROP_RATIO[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, h, w

"""From a PIL picture to the (3, S, S) tensor that an image tower reads."""

import math
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from fastprompt.errors import InputError

_INTERPOLATIONS = ("bicubic", "bilinear")
_RESIZE_MODES = ("shortest", "squash")
_CROP_AREA = (0.08, 1.0)  # share of the picture, uniform
_CROP_RATIO = (3 / 4, 4 / 3)  # width over height, log-uniform
_CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class ImageTransform:
    """What happens to a picture before the image tower; callable.

    Without augmentation, CLIP's evaluation transform: shorter side to ``size`` (antialiased), centre crop, normalise;
    or, as SigLIP was trained, both sides to ``size``.
    With augmentation, the training transform of CoOp and GalLoP: a random crop of 8 % to 100 % of the area resized to
    ``size``, a horizontal flip with probability one half, normalise.

    Attributes:
        size: Side S of the square result, in pixels.
        mean: Per channel, of pixels in 0 .. 1.
        std: Per channel.
        interpolation: "bicubic" or "bilinear".
        resize_mode: "shortest" (crop the rest) or "squash" (both sides); without meaning for random crops.
        augment: Whether the crop and the flip are random.

    Raises:
        InputError: If a field is out of range.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    augment: bool = False

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"image size: expected at least 1 pixel, got {self.size}")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise InputError(
                f"mean and std: expected three numbers each, std above 0, got mean={self.mean} std={self.std}"
            )
        if self.interpolation not in _INTERPOLATIONS:
            raise InputError(f"interpolation: expected one of {_INTERPOLATIONS}, got {self.interpolation!r}")
        if self.resize_mode not in _RESIZE_MODES:
            raise InputError(f"resize_mode: expected one of {_RESIZE_MODES}, got {self.resize_mode!r}")

    @property
    def deterministic(self) -> bool:
        """Whether a picture always gives the same tensor, so that its features can be cached."""
        return not self.augment

    @property
    def description(self) -> str:
        """One line that is equal for equal transforms only; part of cache keys."""
        kind = "random-resized-crop+flip" if self.augment else f"resize-{self.resize_mode}+centre-crop"
        return f"{kind} size={self.size} interpolation={self.interpolation} mean={self.mean} std={self.std}"

    def __call__(self, image: Image.Image, generator: torch.Generator | None = None) -> Tensor:
        """Transform one picture.

        Args:
            image: An RGB picture.
            generator: Source of the randomness where ``augment`` is set; not the global one, which threads would share.

        Returns:
            A (3, S, S) float32 tensor.

        Raises:
            InputError: If ``augment`` is set and there is no generator.
        """
        if self.augment:
            interpolation = InterpolationMode(self.interpolation)
            if generator is None:
                raise InputError("an augmenting transform needs a torch.Generator, got None")
            box = _crop_box(image.height, image.width, generator)
            image = tv.resized_crop(image, *box, [self.size, self.size], interpolation, antialias=True)
            if torch.rand(1, generator=generator).item() < 0.5:
                image = tv.horizontal_flip(image)
        else:
            image = self.visible(image)
        # Divided, as open_clip does: tv.to_dtype multiplies by 1/255, which differs in the last bit.
        pixels = tv.pil_to_tensor(image).float().div(255)
        return tv.normalize(pixels, list(self.mean), list(self.std))

    def visible(self, image: Image.Image) -> Image.Image:
        """Return the square that the image tower sees without augmentation, ``size`` pixels wide."""
        size = [self.size] if self.resize_mode == "shortest" else [self.size, self.size]
        image = tv.resize(image, size, InterpolationMode(self.interpolation), antialias=True)
        return tv.center_crop(image, [self.size, self.size])


def _crop_box(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width) as torchvision's RandomResizedCrop, which can draw from the global RNG only."""
    log_ratio = math.log(_CROP_RATIO[0]), math.log(_CROP_RATIO[1])
    for _ in range(_CROP_ATTEMPTS):
        area = height * width * torch.empty(1).uniform_(*_CROP_AREA, generator=generator).item()
        ratio = torch.empty(1).uniform_(*log_ratio, generator=generator).exp().item()
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(torch.randint(height - h + 1, (1,), generator=generator))
            left = int(torch.randint(width - w + 1, (1,), generator=generator))
            return top, left, h, w
    # Very long or very tall pictures: the largest centred box whose ratio is allowed.
    ratio = min(max(width / height, _CROP_RATIO[0]), _CROP_RATIO[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, h, w

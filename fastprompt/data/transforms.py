"""From a PIL picture to the (3, S, S) tensor that an image tower reads."""

import math
from dataclasses import dataclass

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from fastprompt.errors import InputError

_INTERPOLATIONS = ("bicubic", "bilinear")
_RESIZE_MODES = ("shortest", "squash")
MOST_RESIZED_PIXELS = 2**24  # of a picture before it is cropped: 64 MiB


@dataclass(frozen=True)
class ImageTransform:
    """What happens to a picture before the image tower; callable. Random crops are elsewhere: ``random_crops``.

    CLIP's evaluation transform: shorter side to ``size`` (antialiased), centre crop, normalise; or, as SigLIP was
    trained, both sides to ``size``.

    Attributes:
        size: Side S of the square result, in pixels.
        mean: Per channel, of pixels in 0 .. 1.
        std: Per channel.
        interpolation: "bicubic" or "bilinear".
        resize_mode: "shortest" (crop the rest) or "squash" (both sides).

    Raises:
        InputError: If a field is out of range.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"

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
    def description(self) -> str:
        """One line that is equal for equal transforms only; part of cache keys, like how levels are read."""
        numbers = f"size={self.size} interpolation={self.interpolation} mean={self.mean} std={self.std}"
        return f"high-byte+resize-{self.resize_mode}+centre-crop {numbers}"

    def __call__(self, image: Image.Image) -> Tensor:
        """Transform one picture.

        Args:
            image: An RGB picture.

        Returns:
            A (3, S, S) float32 tensor.
        """
        # Divided, as open_clip does: tv.to_dtype multiplies by 1/255, which differs in the last bit.
        pixels = tv.pil_to_tensor(self.visible(image)).float().div(255)
        return tv.normalize(pixels, list(self.mean), list(self.std))

    def visible(self, image: Image.Image) -> Image.Image:
        """Return the square that the image tower sees, ``size`` pixels wide.

        It is cut out of the resized picture. Where that would have more than 2**24 pixels (at 224 pixels, a picture 335
        times as long as wide), only the middle is resized: of noise, one value in 15,000 is another one then, by at
        most two levels.
        """
        if self.resize_mode == "squash":
            return self._resize(image, [self.size, self.size])
        short, long = sorted(image.size)
        if self.size * (self.size * long // short) > MOST_RESIZED_PIXELS:
            return self._resized_middle(image)
        return tv.center_crop(self._resize(image, [self.size]), [self.size, self.size])

    def _resize(self, image: Image.Image, size: list[int]) -> Image.Image:
        return tv.resize(image, size, InterpolationMode(self.interpolation), antialias=True)

    def _resized_middle(self, image: Image.Image) -> Image.Image:
        """The centre crop of the resized picture, from the part of it alone that the crop depends on."""
        short, long = sorted(image.size)
        resized = self.size * long // short
        scale = long / resized
        start = round((resized - self.size) / 2) * scale
        stop = start + self.size * scale
        reach = math.ceil(2 * max(scale, 1)) + 1  # of the cubic filter
        first, last = max(int(start) - reach, 0), min(math.ceil(stop) + reach, long)
        if image.width == long:
            near, box = (first, 0, last, short), (start - first, 0, stop - first, short)
        else:
            near, box = (0, first, short, last), (0, start - first, short, stop - first)
        mode = Image.Resampling[self.interpolation.upper()]
        return image.crop(near).resize((self.size, self.size), mode, box)

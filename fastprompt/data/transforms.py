"""From a PIL picture to the (3, S, S) tensor that an image tower reads."""

from dataclasses import dataclass

from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from fastprompt.errors import InputError

_INTERPOLATIONS = ("bicubic", "bilinear")
_RESIZE_MODES = ("shortest", "squash")


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
        """One line that is equal for equal transforms only; part of cache keys."""
        numbers = f"size={self.size} interpolation={self.interpolation} mean={self.mean} std={self.std}"
        return f"resize-{self.resize_mode}+centre-crop {numbers}"

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
        """Return the square that the image tower sees, ``size`` pixels wide."""
        size = [self.size] if self.resize_mode == "shortest" else [self.size, self.size]
        image = tv.resize(image, size, InterpolationMode(self.interpolation), antialias=True)
        return tv.center_crop(image, [self.size, self.size])

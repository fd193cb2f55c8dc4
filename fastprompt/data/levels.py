"""Pictures of every kind as RGB with 8 bits a channel."""

import numpy as np
from PIL import ExifTags, Image

_IMAGE_WIDTH, _IMAGE_LENGTH, _BITS_PER_SAMPLE, _PHOTOMETRIC = 256, 257, 258, 262  # tags of TIFF
_WHITE_IS_ZERO = 0


def as_rgb(image: Image.Image) -> Image.Image:
    """Return a picture as RGB, in the orientation in which its rows are stored; transparency is dropped.

    Pillow clips grey levels of more than 8 bits, which turns a photograph white. Here their high byte is kept, as
    Pillow itself keeps that of colours: a grey picture of 16 bits equals the same picture in 16-bit colour.

    Args:
        image: As opened, not loaded yet.

    Raises:
        ValueError: If grey levels have 32 bits or a fraction: files do not say which of them is white.
    """
    image.getexif().pop(ExifTags.Base.Orientation, None)  # or Pillow turns TIFF pictures, and no others
    if not image.mode.startswith(("I", "F")):
        return image.convert("RGB")
    levels = np.asarray(image) >> (_grey_bits(image) - 8)
    if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts 8 bits alone
        levels = 255 - levels
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def stored_size(image: Image.Image) -> tuple[int, int]:
    """Height and width of what ``as_rgb`` will return, from the header alone."""
    if image.format == "TIFF":  # Pillow may say what it would be after turning
        return image.tag_v2[_IMAGE_LENGTH], image.tag_v2[_IMAGE_WIDTH]
    return image.height, image.width


def _grey_bits(image: Image.Image) -> int:
    """How many bits the levels of modes I, I;16 and F have in the file."""
    if image.format in ("PNG", "PPM") and image.mode != "F":
        return 16  # of PPM, Pillow brings any range to 16 bits
    if image.mode.startswith("I;16"):
        return image.tag_v2[_BITS_PER_SAMPLE][0] if image.format == "TIFF" else 16
    kind = "floating-point" if image.mode == "F" else "signed or 32-bit"
    raise ValueError(f"expected levels of 8 or 16 bits, got {kind} ones, whose range a file does not say")

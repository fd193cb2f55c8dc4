"""Pictures of every depth, mode and orientation become the RGB that one expects."""

import numpy as np
import pytest
from PIL import ExifTags, Image

from fastprompt.data import decode_images, load_image
from fastprompt.data.reading import IMAGE_FORMATS
from fastprompt.errors import InputError
from tests.data.images_on_disk import write_png, write_tiff

SIZE = (7, 5)  # width and height
DEEP = np.random.default_rng(0).integers(0, 2**16, SIZE[::-1], dtype=np.uint16)
DEEP[0, :3] = 0, 255, 65535
COLOR = np.random.default_rng(1).integers(0, 2**16, (*SIZE[::-1], 3), dtype=np.uint16)


def loaded(path):
    return np.array(load_image(path))


def png_rows(levels):
    return b"".join(b"\0" + row.astype(">u2").tobytes() for row in levels)


def packed_12_bits(levels):
    """Rows of 12-bit levels; a row of an odd number of them ends in half a byte."""
    bits = np.unpackbits(levels.astype(">u2").view(np.uint8).reshape(*levels.shape, 2), axis=-1)[..., 4:]
    return np.packbits(bits.reshape(len(levels), -1), axis=1).tobytes()


def pgm(path, levels, most):
    path.write_bytes(b"P5 7 5 %d\n" % most + levels.astype(">u2").tobytes())
    return path


def test_16_bit_greyscale_keeps_the_high_byte(tmp_path):
    files = [
        write_png(tmp_path / "grey.png", SIZE, 16, 0, png_rows(DEEP)),
        write_tiff(tmp_path / "grey.tif", SIZE, 16, DEEP.astype("<u2").tobytes()),
        pgm(tmp_path / "grey.pgm", DEEP, 65535),
    ]
    for file in files:
        assert np.array_equal(loaded(file), np.repeat((DEEP >> 8)[..., None], 3, axis=2)), file
    decoded = decode_images(files)
    assert (decoded.pixels.view(3, *SIZE[::-1], 3).numpy() == (DEEP >> 8)[..., None]).all()


def test_grey_of_16_bits_equals_the_same_picture_in_colour(tmp_path):
    grey = write_png(tmp_path / "grey.png", SIZE, 16, 0, png_rows(DEEP))
    colour = np.repeat(DEEP[..., None], 3, axis=2)
    assert np.array_equal(loaded(grey), loaded(write_png(tmp_path / "colour.png", SIZE, 16, 2, png_rows(colour))))
    tiff = write_tiff(tmp_path / "colour.tif", SIZE, 16, colour.tobytes(), samples=3, photometric=2)
    assert np.array_equal(loaded(grey), loaded(tiff))


def test_16_bit_colour_keeps_the_high_byte(tmp_path):
    png = write_png(tmp_path / "colour.png", SIZE, 16, 2, png_rows(COLOR))
    tiff = write_tiff(tmp_path / "colour.tif", SIZE, 16, COLOR.tobytes(), samples=3, photometric=2)
    assert np.array_equal(loaded(png), COLOR >> 8)
    assert np.array_equal(loaded(tiff), COLOR >> 8)


def test_levels_of_10_and_12_bits_are_scaled_by_their_depth(tmp_path):
    tiff = write_tiff(tmp_path / "grey.tif", SIZE, 12, packed_12_bits(DEEP >> 4))
    assert np.array_equal(loaded(tiff)[..., 1], DEEP >> 8)
    # Pillow brings 0 .. 1023 to 0 .. 65535 first.
    assert np.array_equal(loaded(pgm(tmp_path / "grey.pgm", DEEP >> 6, 1023))[..., 1], DEEP >> 8)


def test_16_bits_of_which_0_is_white_are_inverted_as_8_bits_are(tmp_path):
    deep = write_tiff(tmp_path / "16.tif", SIZE, 16, DEEP.tobytes(), photometric=0)
    flat = write_tiff(tmp_path / "8.tif", SIZE, 8, (DEEP >> 8).astype(np.uint8).tobytes(), photometric=0)
    assert np.array_equal(loaded(deep)[..., 0], 255 - (DEEP >> 8))
    assert np.array_equal(loaded(deep), loaded(flat))


@pytest.mark.parametrize(
    ("bits", "kind", "dtype", "found"),
    [
        (32, 1, np.uint32, "signed or 32-bit"),
        (32, 2, np.int32, "signed or 32-bit"),
        (16, 2, np.int16, "signed or 32-bit"),
        (32, 3, np.float32, "floating-point"),
    ],
)
def test_levels_of_unknown_range_are_refused(tmp_path, bits, kind, dtype, found):
    file = write_tiff(tmp_path / "grey.tif", SIZE, bits, (DEEP >> 8).astype(dtype).tobytes(), kind=kind)
    with pytest.raises(InputError, match=f"grey.tif: cannot be read .*levels of 8 or 16 bits, got {found} ones"):
        load_image(file)


def test_modes_of_8_bits_are_converted_as_pillow_does(tmp_path):
    grey = Image.fromarray((DEEP >> 8).astype(np.uint8))
    colour = Image.fromarray((COLOR >> 8).astype(np.uint8))
    alpha = Image.fromarray((COLOR[..., 0] & 255).astype(np.uint8))
    palette = colour.quantize(9)
    pictures = {
        "grey.png": (grey, grey),
        "grey_alpha.png": (Image.merge("LA", [grey, alpha]), grey),
        "palette.gif": (palette, palette),
        "palette.png": (palette, palette),
        "alpha.png": (Image.merge("RGBA", [*colour.split(), alpha]), colour),
        "bits.png": (grey.point(lambda v: 255 * (v > 99), "1"), grey.point(lambda v: 255 * (v > 99))),
        "print.tif": (colour.convert("CMYK"), colour),
    }
    for name, (picture, expected) in pictures.items():
        picture.save(tmp_path / name)
        assert np.array_equal(loaded(tmp_path / name), np.array(expected.convert("RGB"))), name


LOSSLESS = {"webp": {"lossless": True}, "avif": {"quality": 100, "subsampling": "4:4:4"}}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif", "tif", "lzw.tif"])
def test_no_orientation_is_applied_in_any_format(tmp_path, suffix, orientation):
    if suffix == "avif" and "AVIF" not in IMAGE_FORMATS:
        pytest.skip("this Pillow has no AVIF")
    levels = (COLOR >> 8).astype(np.uint8)
    options = LOSSLESS.get(suffix, {}) | ({"compression": "tiff_lzw"} if suffix == "lzw.tif" else {})
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    turned, plain = tmp_path / f"turned.{suffix}", tmp_path / f"plain.{suffix}"
    Image.fromarray(levels).save(turned, exif=exif, **options)
    Image.fromarray(levels).save(plain, **options)
    assert np.array_equal(loaded(turned), loaded(plain))
    assert decode_images([turned]).places.tolist() == [[0, 5, 7]]
    if suffix not in ("jpg", "avif"):
        assert np.array_equal(loaded(turned), levels)

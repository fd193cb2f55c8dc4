import numpy as np
import pytest
import torch
from PIL import Image

from fastprompt.data import ImageTransform, find_images, load_image, read_batch
from fastprompt.errors import InputError
from tests.data.images_on_disk import write_image

HALF = (0.5, 0.5, 0.5)


@pytest.fixture
def paths(tmp_path):
    return [write_image(tmp_path / f"{i}.png", seed=i, size=(20 + i, 16)) for i in range(5)]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16"])
def test_images_of_any_mode_become_rgb(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new("I;16" if mode == "I;16" else mode, (4, 3)).save(path)
    image = load_image(str(path))
    assert (image.mode, image.size) == ("RGB", (4, 3))


def test_missing_image(tmp_path):
    with pytest.raises(InputError, match=r"^image .*none.png: no such file$"):
        load_image(tmp_path / "none.png")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's own remarks on damaged TIFF files
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tif", "webp"])
def test_damaged_images_are_named(tmp_path, suffix):
    """Cut anywhere or with bytes overwritten, a file either still decodes or is named in one sentence."""
    path = write_image(tmp_path / f"image.{suffix}", size=(40, 30))
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(60):
        damaged = bytearray(whole[: rng.integers(0, len(whole))] if trial % 2 else whole)
        for place in rng.integers(0, max(len(damaged), 1), 8 if damaged else 0):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            load_image(path)
        except InputError as error:
            refused += 1
            assert str(error).startswith(f"image {path}: cannot be read as an image")
    assert refused > 10


def test_find_images_takes_image_files_only(tmp_path, paths):
    for name in (".hidden.png", "notes.txt", "Z.JPEG"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert find_images(tmp_path) == (*paths, tmp_path / "Z.JPEG")


def test_batches_keep_the_order_of_paths(paths):
    transform = ImageTransform(8, HALF, HALF)
    batch = read_batch(paths[::-1], transform, workers=3)
    assert torch.equal(batch, torch.stack([transform(load_image(path)) for path in paths[::-1]]))


def test_an_unreadable_image_in_a_batch_is_named(paths):
    paths[3].write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"3.png: cannot be read as an image"):
        read_batch(paths, ImageTransform(8, HALF, HALF))

import numpy as np
import pytest
import torch

from fastprompt.data import decode_images, decoded_bytes, load_image
from fastprompt.errors import InputError
from tests.data.images_on_disk import write_image


@pytest.fixture
def paths(tmp_path):
    return [write_image(tmp_path / f"{i}.png", seed=i, size=(20 + i, 16)) for i in range(5)]


def image(decoded, index):
    start, height, width = decoded.places[index].tolist()
    return decoded.pixels[start : start + 3 * height * width].view(height, width, 3)


@pytest.mark.parametrize("workers", [1, 3])
def test_levels_are_those_of_the_files(paths, workers):
    decoded = decode_images(paths, workers=workers)
    assert len(decoded) == 5 and decoded.pixels.dtype == torch.uint8
    assert len(decoded.pixels) == decoded_bytes(paths) == sum(3 * 16 * (20 + i) for i in range(5))
    for i, path in enumerate(paths):
        assert np.array_equal(image(decoded, i), np.array(load_image(path)))


def test_some_of_the_images_share_the_levels(paths):
    decoded = decode_images(paths)
    some = decoded[torch.tensor([3, 0, 3])]
    assert some.pixels is decoded.pixels and len(some) == 3
    for place, index in enumerate((3, 0, 3)):
        assert torch.equal(image(some, place), image(decoded, index))


def test_grey_images_are_decoded_as_rgb(tmp_path):
    load_image(write_image(tmp_path / "colour.png")).convert("L").save(tmp_path / "grey.png")
    decoded = decode_images([tmp_path / "grey.png"])
    assert np.array_equal(image(decoded, 0), np.array(load_image(tmp_path / "grey.png")))


@pytest.mark.parametrize("work", [decode_images, decoded_bytes])
def test_an_unreadable_image_is_named(paths, work):
    paths[3].write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"3.png: cannot be read as an image"):
        work(paths)

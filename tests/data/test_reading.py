import os
import resource
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastprompt.data import ImageTransform, decoded_bytes, find_images, load_image, read_batch
from fastprompt.data.reading import IMAGE_FORMATS, IMAGE_SUFFIXES
from fastprompt.errors import InputError
from tests.data.images_on_disk import write_image, write_png

HALF = (0.5, 0.5, 0.5)


@pytest.fixture
def memory_limit():
    """Return a context in which this process may take so many more bytes of addresses."""

    @contextmanager
    def limited(more):
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (taken + more, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)

    return limited


@pytest.fixture
def paths(tmp_path):
    return [write_image(tmp_path / f"{i}.png", seed=i, size=(20 + i, 16)) for i in range(5)]


def test_missing_image(tmp_path):
    with pytest.raises(InputError, match=r"^image .*none.png: no such file$"):
        load_image(tmp_path / "none.png")


@pytest.mark.parametrize("work", [load_image, lambda path: decoded_bytes([path])])
def test_only_files_are_read(tmp_path, work):
    """Of a pipe without a writer, one would wait for ever."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for path in (tmp_path / "pipe.jpg", tmp_path / "folder.jpg", "/dev/zero"):
        with pytest.raises(InputError, match=rf"^image {path}: expected a file, got a folder, pipe or device$"):
            work(path)
    assert find_images(tmp_path) == ()
    for path in ("a\0.png", tmp_path / ("x" * 300)):
        with pytest.raises(
            InputError, match=r"^image .*: cannot be read as an image \((embedded null|File name)[^/]*\)$"
        ):
            work(path)


def test_only_the_listed_formats_are_opened_whatever_a_file_is_called(tmp_path):
    """Pillow would hand PostScript to Ghostscript."""
    (tmp_path / "cat.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    write_image(tmp_path / "cat.ico")
    for name in ("cat.jpg", "cat.ico"):
        with pytest.raises(InputError, match=f"{name}: cannot be read as an image .it is none of .*GIF, JPEG, PNG"):
            load_image(tmp_path / name)
    other = write_image(tmp_path / "cat.png").rename(tmp_path / "png.jpg")
    assert load_image(other).size == (12, 10)  # told by its content


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_every_listed_ending_is_found_and_read(tmp_path, suffix):
    if suffix == ".jfif" or suffix == ".jpe":
        path = write_image(tmp_path / "cat.jpg").rename(tmp_path / f"cat{suffix}")
    else:
        path = write_image(tmp_path / f"cat{suffix}")
    assert find_images(tmp_path) == (path,)
    assert load_image(path).size == (12, 10)


def test_avif_is_read_where_pillow_has_it():
    Image.init()
    assert ("AVIF" in IMAGE_FORMATS) == ("AVIF" in Image.SAVE)


def test_pictures_of_too_many_pixels_are_refused_by_their_headers(tmp_path):
    path = write_png(tmp_path / "huge.png", (60_000, 60_000), 8, 2, b"")
    with pytest.raises(InputError, match=r"huge.png: cannot be read as an image \(.*3600000000 pixels.*exceeds limit"):
        load_image(path)


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
    write_image(tmp_path / ".checkpoints" / "0.png")
    write_image(tmp_path / "below" / "0.png")
    assert set(find_images(tmp_path, recursive=True)) == {*paths, tmp_path / "Z.JPEG", tmp_path / "below" / "0.png"}


@pytest.mark.parametrize("size", [(1, 100_000), (60_000, 1)])
def test_very_long_pictures_take_little_memory(tmp_path, size, memory_limit):
    """The file has some hundred bytes, the resized picture 15 or 20 GB."""
    path = write_png(tmp_path / "long.png", size, 8, 0, (b"\0" + b"\x40" * size[0]) * size[1])
    assert path.stat().st_size < 1000
    with memory_limit(2**30):
        batch = read_batch([path], ImageTransform(224, HALF, HALF), workers=1)
    assert batch.shape == (1, 3, 224, 224) and torch.allclose(batch, torch.tensor(2 * 0x40 / 255 - 1))


def test_batches_keep_the_order_of_paths(paths):
    transform = ImageTransform(8, HALF, HALF)
    batch = read_batch(paths[::-1], transform, workers=3)
    assert torch.equal(batch, torch.stack([transform(load_image(path)) for path in paths[::-1]]))


def test_an_unreadable_image_in_a_batch_is_named(paths):
    paths[3].write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"3.png: cannot be read as an image"):
        read_batch(paths, ImageTransform(8, HALF, HALF))

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from fastprompt.data import ImageTransform
from fastprompt.errors import InputError

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("width, height", [(97, 61), (40, 130), (32, 32), (20, 25), (333, 34)])
def test_equals_open_clips_evaluation_transform(width, height, interpolation):
    theirs = open_clip.image_transform(32, is_train=False, mean=MEAN, std=STD, interpolation=interpolation)
    image = picture(width, height)
    ours = ImageTransform(32, MEAN, STD, interpolation)(image)
    torch.testing.assert_close(ours, theirs(image), rtol=0, atol=0)


def test_squashing_equals_open_clips():
    theirs = open_clip.image_transform(32, is_train=False, mean=MEAN, std=STD, resize_mode="squash")
    image = picture(97, 61)
    ours = ImageTransform(32, MEAN, STD, resize_mode="squash")
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=0)
    assert ours.description != ImageTransform(32, MEAN, STD).description
    with pytest.raises(InputError, match="resize_mode: expected one of"):
        ImageTransform(32, MEAN, STD, resize_mode="stretch")


def test_descriptions_differ_where_transforms_do():
    one = ImageTransform(32, MEAN, STD)
    others = [
        ImageTransform(33, MEAN, STD),
        ImageTransform(32, STD, STD),
        ImageTransform(32, MEAN, MEAN),
        ImageTransform(32, MEAN, STD, "bilinear"),
    ]
    assert len({transform.description for transform in [one, *others]}) == 5


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"size": 0}, "image size: expected at least 1 pixel, got 0"),
        ({"std": (0.1, 0.0, 0.1)}, "mean and std: expected three numbers each, std above 0"),
        ({"mean": (0.5,)}, "mean and std: expected three numbers each, std above 0"),
        ({"interpolation": "nearest"}, r"interpolation: expected one of \('bicubic', 'bilinear'\), got 'nearest'"),
    ],
)
def test_bad_fields(changes, sentence):
    with pytest.raises(InputError, match=sentence):
        ImageTransform(**({"size": 32, "mean": MEAN, "std": STD} | changes))

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from fastprompt.data import ImageTransform
from fastprompt.data.transforms import MOST_RESIZED_PIXELS
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


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_equals_open_clips_on_many_sizes(interpolation):
    sizes = np.random.default_rng(5).integers(1, 300, (60, 2))
    for i, (width, height) in enumerate(sizes.tolist()):
        theirs = open_clip.image_transform(32, is_train=False, mean=MEAN, std=STD, interpolation=interpolation)
        image = picture(width, height, seed=i)
        assert torch.equal(ImageTransform(32, MEAN, STD, interpolation)(image), theirs(image)), (width, height)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("width, height", [(1, 336), (1000, 2), (3, 1007), (2400, 5), (7, 4000)])
def test_of_very_long_pictures_only_the_middle_is_resized(width, height, interpolation):
    """Boxes of float32 in Pillow move few values across a rounding."""
    transform = ImageTransform(224, MEAN, STD, interpolation)
    image = picture(width, height)
    whole = tv.resize(image, [224], InterpolationMode(interpolation), antialias=True)
    assert whole.width * whole.height > MOST_RESIZED_PIXELS
    expected = np.array(tv.center_crop(whole, [224, 224])).astype(int)
    difference = np.abs(np.array(transform.visible(image)) - expected)
    assert difference.max() <= 2
    assert (difference > 0).mean() < 1e-3


def test_the_middle_of_a_picture_may_be_all_of_it():
    """The part that is read ends at the border of the picture."""
    image = picture(60, 50)
    actual = np.array(ImageTransform(32, MEAN, STD)._resized_middle(image)).astype(int)
    assert np.abs(actual - np.array(ImageTransform(32, MEAN, STD).visible(image))).max() <= 2


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

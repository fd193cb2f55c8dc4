import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torchvision.transforms import ToTensor, v2

from fastprompt.data import ImageTransform
from fastprompt.errors import InputError

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def picture(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def generator(seed):
    return torch.Generator().manual_seed(seed)


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


@pytest.mark.parametrize("width, height", [(97, 61), (40, 130), (200, 20), (20, 200), (3, 2)])
def test_augmentation_equals_torchvisions_for_the_same_stream(width, height):
    """torchvision draws from the global generator; in the same order, so equal seeds give equal pictures."""
    bicubic = v2.InterpolationMode.BICUBIC
    theirs = v2.Compose(
        [
            v2.RandomResizedCrop(32, scale=(0.08, 1.0), interpolation=bicubic, antialias=True),
            v2.RandomHorizontalFlip(),
            ToTensor(),
            v2.Normalize(MEAN, STD),
        ]
    )
    ours, image = ImageTransform(32, MEAN, STD, augment=True), picture(width, height)
    for seed in range(20):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            expected = theirs(image)
        torch.testing.assert_close(ours(image, generator(seed)), expected, rtol=0, atol=0)


def test_augmentation_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    ImageTransform(32, MEAN, STD, augment=True)(picture(50, 40), generator(3))
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_needs_a_generator():
    with pytest.raises(InputError, match=r"needs a torch.Generator, got None"):
        ImageTransform(32, MEAN, STD, augment=True)(picture(50, 40))


def test_only_the_test_transform_is_deterministic():
    assert ImageTransform(32, MEAN, STD).deterministic
    assert not ImageTransform(32, MEAN, STD, augment=True).deterministic


def test_descriptions_differ_where_transforms_do():
    one = ImageTransform(32, MEAN, STD)
    others = [
        ImageTransform(33, MEAN, STD),
        ImageTransform(32, STD, STD),
        ImageTransform(32, MEAN, MEAN),
        ImageTransform(32, MEAN, STD, "bilinear"),
        ImageTransform(32, MEAN, STD, augment=True),
    ]
    assert len({transform.description for transform in [one, *others]}) == 6


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

"""Random crops of training images: those of torchvision, from memory and from disk alike."""

import logging
from functools import partial

import pytest
import torch
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from fastprompt.data import decode_images, draw_crops, load_dataset, load_image
from fastprompt.errors import InputError
from fastprompt.experiment import augmentation
from fastprompt.experiment.augmentation import KeptImages, read_crops, training_source
from fastprompt.experiment.configure import configure
from tests.data.images_on_disk import write_image


@pytest.fixture
def paths(tmp_path):
    return [write_image(tmp_path / f"{i}.png", seed=i, size=(50 + i, 40)) for i in range(5)]


def generator(seed):
    return torch.Generator().manual_seed(seed)


def crops(paths, seed, read, backbone):
    return read_crops(paths, generator=generator(seed), read=read, backbone=backbone)


def test_crops_are_those_of_torchvision(paths, vit_backbone):
    actual = crops(paths, 3, KeptImages(paths, vit_backbone.device, 1.0), vit_backbone)
    assert actual.dtype == vit_backbone.dtype
    drawn = draw_crops(torch.tensor([load_image(path).size[::-1] for path in paths]), generator(3))
    for image, path, box, flip in zip(actual, paths, drawn.boxes.tolist(), drawn.flips.tolist(), strict=True):
        levels = tv.pil_to_tensor(load_image(path))
        levels = tv.resized_crop(levels, *box, [32, 32], InterpolationMode.BICUBIC, antialias=True)
        expected = tv.normalize((levels.flip(-1) if flip else levels).double() / 255, [0.5] * 3, [0.25] * 3)
        # One level is 0.016 here: on processors on which torchvision resizes in floating point it may be another one.
        assert (image - expected).abs().max() < 0.04
        assert (image - expected).abs().mean() < 0.001 + 0.016 * (image != expected.to(image.dtype)).float().mean()


def test_images_are_decoded_once_where_they_fit(paths, vit_backbone, monkeypatch, caplog):
    decoded = []
    monkeypatch.setattr(augmentation, "decode_images", lambda some: decoded.extend(some) or decode_images(some))
    keep, size = KeptImages(paths, vit_backbone.device, 1.0), sum(3 * 40 * (50 + i) for i in range(5)) / 1e9
    assert KeptImages(paths, vit_backbone.device, size).fits
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        anew = KeptImages(paths, vit_backbone.device, 0.99 * size)
    assert "the 5 training images take 0.0 GB decoded, more than the" in caplog.text
    assert "GB of --image-memory, so they are decoded again in every epoch" in caplog.text
    order = [paths[i] for i in (4, 1, 1)]
    for seed in (1, 2):
        assert torch.equal(crops(order, seed, keep, vit_backbone), crops(order, seed, anew, vit_backbone))
    assert decoded == [*paths, *order, *order]
    assert not torch.equal(crops(order, 1, keep, vit_backbone), crops(order, 2, keep, vit_backbone))


def test_random_crops_need_a_generator(paths, vit_backbone):
    with pytest.raises(InputError, match=r"random crops need a torch.Generator, got None"):
        read_crops(paths, generator=None, read=KeptImages(paths, vit_backbone.device, 1.0), backbone=vit_backbone)


def test_a_view_depends_on_its_number_and_the_image_alone(paths, vit_backbone):
    read = KeptImages(paths, vit_backbone.device, 1.0)
    whole = augmentation._crop_view(read(paths), 1, vit_backbone)
    assert torch.equal(augmentation._crop_view(read(paths[3:0:-2]), 1, vit_backbone), whole[[3, 1]])
    assert not torch.equal(augmentation._crop_view(read(paths), 0, vit_backbone), whole)


def test_views_of_different_images_are_cut_in_different_places(tmp_path, vit_backbone, monkeypatch):
    paths = [write_image(tmp_path / f"{i}.png", seed=i, size=(400, 300)) for i in range(3)]
    boxes = []
    monkeypatch.setattr(augmentation, "cut", lambda images, crops, backbone: boxes.extend(crops.boxes.tolist()))
    augmentation._crop_view(decode_images(paths), 0, vit_backbone)
    assert len(set(map(tuple, boxes))) == 3


def test_plain_features_are_those_without_augmentation(photos, vit_backbone, tmp_path):
    images, config = load_dataset(photos).train, partial(configure, "coop")
    kept = {"data": photos, "cache_dir": tmp_path}
    ((expected, _),) = training_source(images, vit_backbone, config(**kept), progress=False).plain_batches()
    for options in ({"views": 1}, {"cache": False}):
        source = training_source(images, vit_backbone, config(augment=True, **options, **kept), progress=False)
        features = torch.cat([features.pooled for features, _ in source.plain_batches()])
        torch.testing.assert_close(features, expected.pooled, rtol=0, atol=1e-5)
        augmented = source.batch(torch.arange(len(images)), generator(1)).pooled
        assert (augmented - features).abs().amax() > 1e-3


def test_views_need_the_cache(photos):
    with pytest.raises(InputError, match="2 views are kept in the feature cache, but --no-cache is given"):
        configure("coop", data=photos, augment=True, views=2, cache=False)

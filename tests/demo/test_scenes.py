"""The rendered scenes are what their module says: seeded, disjoint, and with the object where the box is."""

import math

import numpy as np
import pytest
from PIL import Image

from fastprompt.demo import scenes
from fastprompt.demo.objects import ObjectSpec


def picture(spec, style, seed):
    rng = np.random.default_rng(seed)
    return scenes.render(scenes.demo_scene(spec, style, rng), rng)


@pytest.mark.parametrize("style", scenes.STYLES)
def test_one_seed_gives_one_picture(style):
    first, box = picture(scenes.DEMO_CLASSES[5], style, 1)
    again, same_box = picture(scenes.DEMO_CLASSES[5], style, 1)
    other, _ = picture(scenes.DEMO_CLASSES[5], style, 2)
    assert first.size == (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE)
    assert box == same_box
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("style", ("photo", *scenes.DOMAINS))  # a blur would spread it
def test_the_object_is_inside_its_box_and_nowhere_else(style):
    for seed in range(3):
        pixels = []
        for colour in ("red", "blue"):  # from one seed, only the object differs
            scene = scenes.Scene((ObjectSpec(colour, "plain", "circle"),), (34,), style, ("sticks",), 10)
            drawn, (left, top, right, bottom) = scenes.render(scene, np.random.default_rng(seed))
            pixels.append(np.asarray(drawn))
        differs = (pixels[0] != pixels[1]).any(-1)
        outside = differs.copy()
        outside[top:bottom, left:right] = False
        assert differs.sum() > (100 if style == "drawing" else 0.8 * math.pi * 17**2)
        assert not outside.any()


def test_the_class_lists_are_disjoint_and_complete():
    names = [spec.name for spec in scenes.DEMO_CLASSES]
    assert len(names) == len(set(names)) == 64
    assert names == sorted(names)  # the order that a folder of class folders gives
    assert not set(scenes.DEMO_CLASSES) & set(scenes.PRETRAIN_CLASSES)
    assert len(scenes.PRETRAIN_CLASSES) == 128
    rng = np.random.default_rng(0)
    unknown = [scenes.unknown_object(rng) for _ in range(200)]
    assert not {spec.shape for spec in unknown} & {spec.shape for spec in scenes.DEMO_CLASSES + scenes.PRETRAIN_CLASSES}


def test_no_two_of_the_three_words_tell_the_class():
    for words in (("colour", "texture"), ("colour", "shape"), ("texture", "shape")):
        keys = [tuple(getattr(spec, word) for word in words) for spec in scenes.DEMO_CLASSES]
        assert all(keys.count(key) > 1 for key in keys)


@pytest.mark.slow
def test_write_dataset_writes_the_tree_and_repeats_itself(tmp_path):
    for name in ("first", "second"):
        scenes.write_dataset(tmp_path / name, seed=3, train=1, test=1, domain_test=1, ood=3)
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.jpg"))
    assert len(files) == 64 * 4 + 3
    assert {path.parts[0] for path in files} == {"train", "test", "domains", "ood"}
    assert {path.parts[1] for path in files if path.parts[0] == "domains"} == set(scenes.DOMAINS)
    assert sorted(path.name for path in (tmp_path / "first/test").iterdir()) == [s.name for s in scenes.DEMO_CLASSES]
    assert all((tmp_path / "first" / f).read_bytes() == (tmp_path / "second" / f).read_bytes() for f in files)
    same_class = [tmp_path / "first" / split / scenes.DEMO_CLASSES[0].name / "0000.jpg" for split in ("train", "test")]
    assert not np.array_equal(*(np.asarray(Image.open(path)) for path in same_class))

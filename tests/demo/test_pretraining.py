"""Windows, mirrors and captions that the demo's model is pretrained on."""

import numpy as np
import pytest
import torch

from fastprompt.demo.captions import caption, pretraining_scene
from fastprompt.demo.pretrain import Settings, Vocabulary, build, train
from fastprompt.demo.pretraining_pool import GRID, cut_patches, mirror, render_pool, windows
from fastprompt.demo.scenes import DEMO_CLASSES


@pytest.mark.parametrize("side", [4, 6, GRID])
def test_a_window_is_a_square_of_the_grid_around_the_object(side):
    centres = np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID)), -1).reshape(-1, 2)
    index = windows(centres, side, np.random.default_rng(0)).numpy()
    rows, columns = index // GRID, index % GRID
    assert index.shape == (len(centres), side * side)
    assert index.min() >= 0
    assert index.max() < GRID * GRID
    for places, centre in ((columns, centres[:, 0]), (rows, centres[:, 1])):
        assert (places.max(1) - places.min(1) == side - 1).all()
        assert ((places.min(1) <= centre) & (centre <= places.max(1))).all()


def test_mirrored_patches_are_those_of_the_mirrored_picture():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 128, 128, 3), np.uint8)
    index = windows(np.array([[1, 2], [6, 5]]), 4, np.random.default_rng(1))
    rows = torch.arange(2)[:, None]
    patches, mirrored_index = mirror(torch.from_numpy(cut_patches(pixels))[rows, index], index)
    expected = torch.from_numpy(cut_patches(pixels[:, :, ::-1]))[rows, mirrored_index]
    assert torch.equal(patches, expected)


def test_captions_never_name_a_demo_class_and_stay_inside_the_vocabulary():
    rng = np.random.default_rng(0)
    scenes = [pretraining_scene(rng) for _ in range(500)]
    captions = [caption(scene, rng) for scene in scenes]
    assert not {spec for scene in scenes for spec in scene.objects} & set(DEMO_CLASSES)
    assert all(scene.objects[0].name in text for scene, text in zip(scenes, captions, strict=True))
    Vocabulary()(captions)  # raises for a word that it does not have
    with pytest.raises(ValueError, match="all_words"):
        Vocabulary()(["a photo of a dog"])


@pytest.fixture
def one_thread():
    """As the script itself runs: sums of several threads have no fixed order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(Settings().threads)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_training_lowers_the_loss_and_repeats_itself(one_thread):
    pool, vocabulary = render_pool(64, workers=1), Vocabulary()
    settings = Settings(images=64, steps=12, batch=32, warmup=2)
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        model = build(vocabulary)
        losses = train(model, vocabulary, pool, settings)
        states.append(model.state_dict())
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])

"""A model folder and an image folder that an experiment can be run on in seconds."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from tests.models import TEXT, VIT, make_clip

COLOURS = {"dark_blue": (20, 20, 120), "green": (20, 160, 40), "red": (200, 30, 30), "yellow": (220, 210, 40)}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A folder as open_clip's "local-dir:" takes it."""
    return write_model(tmp_path_factory.mktemp("model"), VIT)


def write_model(folder, vision):
    config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT, "quick_gelu": True}
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    weights = {name: tensor.contiguous() for name, tensor in make_clip(vision).float().state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def write_images(folder, colours, per_class, seed=0):
    rng = np.random.default_rng(seed)
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = np.clip(np.array(colour) + rng.normal(0, 40, (40, 48, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")


@pytest.fixture
def photos(tmp_path):
    """Four classes of coloured noise: 6 training and 4 test images each."""
    write_images(tmp_path / "photos" / "train", COLOURS, 6)
    write_images(tmp_path / "photos" / "test", COLOURS, 4, seed=1)
    return tmp_path / "photos"


@pytest.fixture
def common(model_folder, tmp_path, monkeypatch):
    """Arguments of every training here; relative paths end in a temporary folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTPROMPT_CACHE", str(tmp_path / "cache"))
    return ["--backbone", f"local-dir:{model_folder}", "--shots", "4", "--epochs", "2", "--batch-size", "8"]

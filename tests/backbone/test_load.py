"""What is refused before or while a backbone is loaded, in one sentence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastprompt import InputError, load_backbone
from fastprompt.backbone import load
from tests.experiment.conftest import model_folder  # noqa: F401


@pytest.fixture
def folder(model_folder, tmp_path):  # noqa: F811
    return shutil.copytree(model_folder, tmp_path / "model")


@pytest.mark.parametrize("device", ["meta", "mps", "cuda:99", "cpu:1", "nonsense", ""])
def test_devices_of_other_machines_are_refused_before_anything_is_loaded(device, monkeypatch):
    monkeypatch.setattr(load, "_load_open_clip", None)
    with pytest.raises(InputError, match=rf"device: expected cpu.*, got '{device}'$"):
        load_backbone("ViT-B-32", "openai", device=device)


def test_a_folder_without_weights_is_not_trained_from_random_ones(folder):
    assert load_backbone(f"local-dir:{folder}").embed_dim == 32
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model: expected weights as a .safetensors file in it, got none"):
        load_backbone(f"local-dir:{folder}")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value, folder):
    weights = load_file(folder / "open_clip_model.safetensors")
    weights["visual.proj"][0, 0] = value
    save_file(weights, folder / "open_clip_model.safetensors")
    with pytest.raises(InputError, match=r"expected finite weights, got NaN or infinity in visual.proj"):
        load_backbone(f"local-dir:{folder}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_cfg": {"embed_dim": "x"}}, "could not be loaded"),
        ({"model_cfg": None}, "could not be loaded"),
        ({"preprocess_cfg": {"mean": 0.5}}, r"mean: expected Sequence\[float\], got 0.5"),
        ({"preprocess_cfg": {"std": [0.5, float("nan"), 1]}}, "std: expected a finite number, got nan"),
    ],
)
def test_a_configuration_of_another_shape_is_refused(change, words, folder):
    file = folder / "open_clip_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=words):
        load_backbone(f"local-dir:{folder}")


@pytest.fixture
def hub(monkeypatch):
    """A hub that nobody reaches; gives the timeouts of the questions it was asked."""
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append((url, timeout))
            raise ConnectionError("Name or service not known")

    monkeypatch.setattr(load.huggingface_hub, "get_session", Session)
    monkeypatch.setattr(load.open_clip, "create_model", lambda *_, **__: pytest.fail("went on to download"))
    return asked


@pytest.mark.parametrize(
    ("name", "pretrained", "repository"),
    [
        ("RN50-quickgelu", "openai", "timm/resnet50_clip.openai"),
        ("ViT-B-32", "laion2b_s34b_b79k", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"),
        ("hf-hub:org/model", None, "org/model"),
    ],
)
def test_a_hub_that_does_not_answer_is_asked_once_and_named(name, pretrained, repository, hub, tmp_path):
    words = rf"weights of '{repository}': expected https://\S+ to answer, got ConnectionError; .* FILE.safetensors"
    with pytest.raises(InputError, match=words):
        load_backbone(name, pretrained, device="cpu", cache_dir=tmp_path)
    ((url, timeout),) = hub
    assert f"/{repository}/resolve/main/" in url and 0 < timeout <= 5


def test_weights_that_were_downloaded_need_no_hub(hub, tmp_path):
    snapshot = tmp_path / "models--timm--resnet50_clip.openai"
    (snapshot / "refs").mkdir(parents=True)
    (snapshot / "refs" / "main").write_text("1" * 40)
    (snapshot / "snapshots" / ("1" * 40)).mkdir(parents=True)
    (snapshot / "snapshots" / ("1" * 40) / "open_clip_model.safetensors").write_bytes(b"")
    with pytest.raises(pytest.fail.Exception, match="went on"):
        load_backbone("RN50-quickgelu", "openai", device="cpu", cache_dir=tmp_path)
    assert not hub


def test_by_default_the_cpu_is_taken_where_there_is_nothing_else():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert load.find_device(None).type == expected
    assert load.find_device("cpu") == torch.device("cpu")

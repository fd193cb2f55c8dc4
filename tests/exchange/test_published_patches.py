"""Runs, stored learners and checkpoints on the patch features of PLOT's code keep to them."""

import json
from pathlib import Path

import pytest
import torch

from fastprompt import InputError, Learner, load_backbone
from fastprompt.cli import main
from fastprompt.experiment.runs import load_run
from fastprompt.learners import PLOT, GalLoP
from tests.exchange.conftest import save_dassl
from tests.exchange.test_import import bring_in, buffers, names  # noqa: F401
from tests.experiment.conftest import write_model
from tests.learners.support import moved
from tests.models import RESNET

PUBLISHED = ("--patch-features", "published")


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """In the place of the small ViT, a small ResNet."""
    return write_model(tmp_path_factory.mktemp("resnet"), RESNET)


@pytest.fixture
def backbone(model_folder):
    return load_backbone(f"local-dir:{model_folder}", device="cpu", patches="published")


@pytest.fixture
def value(model_folder):
    return load_backbone(f"local-dir:{model_folder}", device="cpu")


@pytest.fixture
def pixels():
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_a_run_on_published_patches_is_trained_used_and_told_from_the_other(photos, common, backbone, value, capsys):
    train = ["train", "plot", str(photos), *common, "--out", "run"]
    assert main([*train, *PUBLISHED]) == 0
    assert json.loads(Path("run/config.json").read_text())["patch_features"] == "published"
    learner = load_run("run", device="cpu")
    assert (learner.backbone.patches, learner.backbone.fingerprint) == ("published", backbone.fingerprint)
    capsys.readouterr()
    assert main(["evaluate", "run", "--device", "cpu"]) == 0
    assert "encoding" not in capsys.readouterr().err, "its features were not in the cache"
    assert main(train) == 2
    assert "holds a run with patch_features = published, but now patch_features = value" in capsys.readouterr().err
    assert main([*train[:-1], "other"]) == 0
    assert "encoding 16 training images" in capsys.readouterr().err, "features of another kind were taken"
    with pytest.raises(InputError, match=f"{backbone.fingerprint}, but those found now have {value.fingerprint}"):
        load_run("run", backbone=value)
    with pytest.raises(InputError, match=f"{value.fingerprint}, but those found now have {backbone.fingerprint}"):
        load_run("other", backbone=backbone)


def test_a_stored_learner_comes_back_on_the_same_patches(backbone, value, pixels, tmp_path):
    learner = moved(PLOT(backbone, ("dog", "cat"), context=2))
    learner.save_pretrained(tmp_path / "hub")
    again = Learner.from_pretrained(tmp_path / "hub", device="cpu")
    features = backbone.encode_images(pixels)
    assert again.backbone.patches == "published"
    torch.testing.assert_close(again(features).logits, learner(features).logits)
    with pytest.raises(InputError, match=r"-patches=published, but those found now have \w{16}$"):
        Learner.from_pretrained(tmp_path / "hub", backbone=value)


def test_an_imported_checkpoint_of_plot_is_used_with_them(
    backbone,
    model_folder,
    names,  # noqa: F811
    buffers,  # noqa: F811
    random,
    common,
    pixels,
    tmp_path,
):
    contexts = 0.3 * torch.randn(2, 4, 48, generator=random)
    save_dassl(tmp_path / "c", {"ctx": contexts}, buffers(repeat=2))
    assert bring_in(tmp_path / "c", model_folder, "--class-names", names, *PUBLISHED) == 0
    learner = load_run("run", device="cpu")
    expected = PLOT(backbone, learner.class_names, prompts=2, context=4)
    expected.load_state_dict({"contexts": contexts.half().float()})
    features = learner.backbone.encode_images(pixels)
    torch.testing.assert_close(learner(features).logits, expected(backbone.encode_images(pixels)).logits)


def test_onnx_has_them_inside(backbone, pixels, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    from fastprompt.exchange.export import write_onnx

    learner = moved(GalLoP(backbone, ("dog", "cat"), k=(1, 3), context=2)).eval()
    expected = learner(backbone.encode_images(pixels)).logits
    write_onnx(learner, tmp_path / "classifier.onnx")
    session = runtime.InferenceSession(tmp_path / "classifier.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-3, atol=1e-3)

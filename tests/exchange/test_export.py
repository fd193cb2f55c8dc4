"""What leaves this library: a matrix, ONNX, the Hub's format, words; each used without the code that wrote it."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from fastprompt_kernels.topk_similarity import blocked
from safetensors import safe_open

from fastprompt import CoOp, GalLoP, InputError, ZeroShot, load_backbone
from fastprompt.cli import main
from fastprompt.exchange.export import linear_head, write_head, write_onnx
from fastprompt.exchange.words import WARNING, nearest_words
from fastprompt.learners import PLOT, SOTGLP, CoCoOp, DuAlPT, Learner
from tests.learners.support import moved
from tests.models import make_backbone, make_clip

NAMES = ("red fox", "polar bear", "cat")


@pytest.fixture(scope="module")
def backbone():
    return make_backbone(make_clip().float())


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def coop_run(photos, common, tmp_path):
    assert main(["train", "coop", str(photos), *common, "--out", "run"]) == 0
    return tmp_path / "run"


def test_the_head_classifies_with_open_clip_alone(coop_run, model_folder, capsys, caplog):
    assert main(["export", "run"]) == 0
    assert capsys.readouterr().out.strip().endswith("run/head.safetensors")
    with safe_open(coop_run / "head.safetensors", "pt") as file:
        head, described = file.get_tensor("head"), dict(file.metadata())
    model = open_clip.create_model(f"local-dir:{model_folder}")
    size = json.loads(described["preprocessing"])["size"]
    assert size == 32
    pixels = torch.randn(3, 3, size, size)
    with torch.no_grad():
        pooled = F.normalize(model.eval().encode_image(pixels), dim=-1)
    from fastprompt.experiment.runs import load_run

    learner = load_run(coop_run, device="cpu")
    logits = json.loads(described["logit_scale"]) * pooled @ head.T
    torch.testing.assert_close(logits, learner(learner.backbone.encode_images(pixels)).logits, rtol=1e-4, atol=1e-4)
    assert json.loads(described["class_names"]) == list(learner.class_names)
    assert described["whole_prediction"] == "true"
    assert "predicts otherwise" not in caplog.text


@pytest.mark.slow
def test_other_class_names_and_the_refusal_of_class_specific_contexts(coop_run, photos, common, capsys):
    image = str(next(photos.glob("test/*/*.png")))
    assert main(["predict", "run", image, "--class-names", "cat", "dog"]) == 0
    out = capsys.readouterr().out
    assert "cat" in out
    assert "dog" in out
    for command in (["predict", "run", image], ["export", "run", "--out", "same.safetensors"]):
        assert main([*command, "--class-names", "polar_bear", "polar bear"]) == 2
        assert "class_names: expected every class once, got 'polar bear' twice" in capsys.readouterr().err
        assert main([*command, "--class-names", "Cat", "cat"]) == 2
        assert "tells apart, got 'Cat' and 'cat'" in capsys.readouterr().err
    assert main(["export", "run", "--out", "other.safetensors", "--class-names", "cat", "dog"]) == 0
    with safe_open("other.safetensors", "pt") as file:
        assert file.get_tensor("head").shape == (2, 32)
    assert main(["train", "coop", str(photos), *common, "--class-specific", "--out", "own"]) == 0
    capsys.readouterr()
    assert main(["predict", "own", image, "--class-names", "cat", "dog"]) == 2
    assert "coop learned a context for each of its 4 classes" in capsys.readouterr().err
    assert main(["export", "own", "--out", "head.txt"]) == 2
    assert "expected a file that ends in .safetensors or .onnx" in capsys.readouterr().err


def test_a_head_of_gallop_is_its_part_for_the_pooled_feature(backbone, images, tmp_path, caplog):
    learner = moved(GalLoP(backbone, NAMES, k=(1, 3)))
    head, whole = linear_head(learner)
    features = backbone.encode_images(images)
    expected = learner(features).parts["global"].mean(dim=1)
    torch.testing.assert_close(features.pooled @ head.T, expected)
    assert not whole
    write_head(learner, tmp_path / "head.safetensors")
    assert "gallop scores patches, which the head leaves out: it predicts otherwise than the run" in caplog.text
    for export in (linear_head, lambda learner: write_onnx(learner, "classifier.onnx")):
        with pytest.raises(InputError, match="cocoop runs the text tower for every image"):
            export(CoCoOp(backbone, NAMES))


@pytest.mark.slow
@pytest.mark.parametrize("method", [ZeroShot, CoOp, GalLoP])
def test_onnx_gives_the_same_logits(method, backbone, images, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="onnx and onnxscript are not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    learner = moved(method(backbone, NAMES)).eval()
    monkeypatch.setattr(blocked, "LITTLE", 2 * 16 * 4 * 3 + 1)  # between batches of two and of three images
    write_onnx(learner, tmp_path / "classifier.onnx")
    session = runtime.InferenceSession(tmp_path / "classifier.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = learner(backbone.encode_images(images)).logits
    for batch in (images, images[:1]):
        (logits,) = session.run(None, {"images": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected[: len(batch)], rtol=1e-3, atol=1e-3)
    described = session.get_modelmeta().custom_metadata_map
    assert json.loads(described["class_names"]) == list(NAMES)
    assert json.loads(described["preprocessing"])["size"] == 32


@pytest.mark.parametrize("method", [PLOT, DuAlPT, SOTGLP])
def test_a_transport_is_refused_in_one_sentence(method, backbone, tmp_path):
    with pytest.raises(InputError, match=f"{method.method} scores an image by a look at its whole batch"):
        write_onnx(method(backbone, NAMES), tmp_path / "classifier.onnx")


@pytest.mark.slow
def test_onnx_is_needed_for_onnx_alone(backbone, monkeypatch, tmp_path):
    program = "import sys, fastprompt.cli, fastprompt.exchange.export; assert 'onnx' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"needs the package 'onnxscript': pip install 'fastprompt\[onnx\]'"):
        write_onnx(ZeroShot(backbone, NAMES), tmp_path / "classifier.onnx")


def test_save_pretrained_and_from_pretrained(backbone, images, tmp_path):
    learner = moved(GalLoP(backbone, NAMES, k=(1, 3), dropout=0.5))
    learner.with_class_names(["dog", "cat"]).save_pretrained(tmp_path / "hub")
    assert {file.name for file in (tmp_path / "hub").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    features = backbone.encode_images(images)
    for cls in (Learner, GalLoP):
        again = cls.from_pretrained(tmp_path / "hub", backbone=backbone)
        assert (type(again), again.class_names, again.dropout) == (GalLoP, ("dog", "cat"), 0.5)
        torch.testing.assert_close(again(features).logits, learner.with_class_names(["dog", "cat"])(features).logits)
    CoOp(load_backbone("demo", device="cpu"), NAMES).save_pretrained(tmp_path / "by name")
    assert Learner.from_pretrained(tmp_path / "by name", device="cpu").backbone.name == "demo"
    with pytest.raises(InputError, match="holds a learner of gallop, not of coop"):
        CoOp.from_pretrained(tmp_path / "hub", backbone=backbone)
    (tmp_path / "hub" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="expected a safetensors file, got one that is damaged"):
        Learner.from_pretrained(tmp_path / "hub", backbone=backbone)


def test_push_to_hub_and_back(backbone, images, tmp_path, monkeypatch):
    """With a folder in the place of the Hub."""
    hub = tmp_path / "hub"

    class Api:
        def __init__(self, **_):
            pass

        def create_repo(self, repo_id, **_):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, **_):
            shutil.copytree(folder_path, hub / repo_id)
            return f"commit of {repo_id}"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    for module in ("huggingface_hub.hub_mixin", "fastprompt.learners.stored"):
        monkeypatch.setattr(f"{module}.hf_hub_download", lambda repo_id, filename, **_: str(hub / repo_id / filename))
    learner, features = moved(SOTGLP(backbone, NAMES, patches=3)), backbone.encode_images(images)
    assert learner.push_to_hub("someone/animals") == "commit of someone/animals"
    again = Learner.from_pretrained("someone/animals", backbone=backbone)
    assert (again.method, again.options, again.training) == ("sot-glp", learner.options, False)
    assert torch.equal(again(features).logits, learner(features).logits)
    other = make_backbone(backbone.model)
    other.fingerprint = "f" * 16
    with pytest.raises(InputError, match="but those found now have ffffffffffffffff"):
        Learner.from_pretrained("someone/animals", backbone=other)


def test_words_of_a_context_that_was_made_of_words(coop_run, backbone, capsys):
    learner = CoOp(backbone, NAMES, context="a photo of a")
    assert [tokens[0][0] for tokens in nearest_words(learner, 2)["context 1"]] == ["a", "photo", "of", "a"]
    assert nearest_words(learner, 1)["context 1"][0][0][1] == pytest.approx(0, abs=1e-2)
    assert main(["words", "run", "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert WARNING in out
    assert out.count("token") >= 4
    with pytest.raises(InputError, match="zero-shot has learned no context"):
        nearest_words(ZeroShot(backbone, NAMES))
    with pytest.raises(InputError, match="top: expected 1 to"):
        nearest_words(learner, 0)

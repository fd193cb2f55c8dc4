"""The command line from images to a trained, tested, used run; and what it says about bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open

from fastprompt.cli import main
from fastprompt.data import LabelledImages
from fastprompt.errors import InputError
from fastprompt.experiment.runs import load_run
from fastprompt.version import __version__
from tests.experiment.conftest import COLOURS, write_images


def metrics(run):
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def trained(photos, common, capsys):
    assert main(["train", "gallop", str(photos), *common, "--k", "1", "3", "--out", "run"]) == 0
    return capsys.readouterr()


def test_train_writes_a_run_and_a_table_beside_zero_shot(trained, photos, tmp_path):
    run = tmp_path / "run"
    assert {file.name for file in run.iterdir()} == {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "model.safetensors",
        "report.html",
    }
    config = json.loads((run / "config.json").read_text())
    assert (config["method"], config["epochs"], config["lr"], config["k"]) == ("gallop", 2, 0.002, [1, 3])
    lines = metrics(run)
    assert [line["kind"] for line in lines] == ["epoch", "epoch", "evaluation"]
    assert set(lines[-1]["results"]) == {"zero-shot", "gallop"}
    with safe_open(run / "model.safetensors", "pt") as model:
        assert set(model.keys()) == {"global_prompts", "local_prompts", "local_projection"}
        assert "dark blue" in model.metadata()["fastprompt"]
    assert "zero-shot" in trained.out
    assert "gallop" in trained.out
    said = trained.err.splitlines()
    assert said.index("encoding 16 test images") < said.index("encoding 16 training images")
    assert "\r" not in trained.err, "no bars in a file"
    assert [line.split(":")[0] for line in said if line.startswith("epoch")] == ["epoch 1 of 2", "epoch 2 of 2"]
    loss, lr = metrics("run")[0]["loss"], metrics("run")[0]["lr"]
    assert f"epoch 1 of 2: loss {loss:.4f}, " in trained.err and f"lr {lr:.3g}, " in trained.err


def test_a_finished_run_is_read_again_and_another_one_refused(trained, photos, common, capsys, tmp_path):
    files = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "run").iterdir()}
    again = ["train", "gallop", str(photos), *common, "--k", "1", "3", "--out", "run"]
    assert main(again) == 0
    second = capsys.readouterr()
    assert second.out == trained.out.replace("\n\nphotos", "\n\nrun is complete: nothing was trained\n\nphotos")
    assert "training" not in second.err
    assert main([*again, "--lr", "0.5"]) == 2
    said = capsys.readouterr().err
    assert "holds a run with lr = 0.002, but now lr = 0.5: choose another --out, such as run-lr-0.5, or" in said
    assert {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "run").iterdir()} == files
    (tmp_path / "run" / "report.html").unlink()
    assert main(again) == 0
    assert {file.name for file in (tmp_path / "run").iterdir()} == {file.name for file in files}


@pytest.mark.slow
def test_training_learns_and_the_second_run_takes_features_from_the_cache(photos, common, capsys):
    more = ["--epochs", "30", "--lr", "0.05"]
    assert main(["train", "coop", str(photos), *common, *more, "--out", "first"]) == 0
    lines = metrics("first")
    assert lines[29]["loss"] < 0.8 * lines[0]["loss"]
    assert "encoding 16 training images" in capsys.readouterr().err
    assert main(["train", "coop", str(photos), *common, *more, "--out", "second"]) == 0
    assert "encoding" not in capsys.readouterr().err
    assert Path("second/model.safetensors").read_bytes() == Path("first/model.safetensors").read_bytes()


def test_augmented_and_uncached_training_run_on_images(photos, common, tmp_path):
    for flags in (["--augment"], ["--no-cache"]):
        assert main(["train", "coop", str(photos), *common, *flags, "--out", flags[0].strip("-")]) == 0
    assert metrics("augment")[0]["loss"] != metrics("no-cache")[0]["loss"]


def test_views_are_encoded_once_and_end_alike(photos, common, capsys):
    flags = ["--augment", "--views", "2"]
    assert main(["train", "coop", str(photos), *common, *flags, "--out", "first"]) == 0
    said = capsys.readouterr().err
    for what in ("16 training images, view 1 of 2", "16 training images, view 2 of 2", "16 test images"):
        assert f"encoding {what}\n" in said
    assert main(["train", "coop", str(photos), *common, *flags, "--out", "second"]) == 0
    assert "encoding" not in capsys.readouterr().err
    assert Path("second/model.safetensors").read_bytes() == Path("first/model.safetensors").read_bytes()
    assert main(["train", "coop", str(photos), *common, "--views", "2", "--out", "third"]) == 2
    assert "views: expected at least 0, and 0 without --augment, got 2" in capsys.readouterr().err


def test_base_to_new_reports_both_halves(photos, common, capsys):
    assert main(["train", "coop", str(photos), *common, "--classes", "base", "--out", "run"]) == 0
    results = metrics("run")[-1]["results"]
    assert set(results["coop"]) == {"base", "new", "harmonic"}
    with safe_open("run/model.safetensors", "pt") as model:
        assert json.loads(model.metadata()["fastprompt"])["class_names"] == ["dark blue", "green"]


def test_zero_shot_is_a_run_like_any_other(photos, common, capsys):
    assert main(["train", "zero-shot", str(photos), *common[:2], "--template", "{} colour", "--out", "run"]) == 0
    assert main(["predict", "run", str(photos / "test" / "red")]) == 0
    assert capsys.readouterr().out.count("red/") == 4


def test_default_run_folder_says_what_ran(photos, common, tmp_path):
    assert main(["train", "coop", str(photos), *common]) == 0
    (folder,) = (tmp_path / "runs" / "photos" / "coop").iterdir()
    assert [run.name for run in folder.iterdir()] == ["shots4-seed1"]


def test_evaluate_repeats_the_result_of_training(trained, photos, capsys, tmp_path):
    result = metrics(tmp_path / "run")[-1]["results"]["gallop"]
    assert main(["evaluate", "run"]) == 0
    out = capsys.readouterr().out
    assert f"{100 * result['accuracy']:.1f}" in next(line for line in out.splitlines() if line.startswith("gallop"))
    assert "16 images (test), 4 classes" in out


def test_evaluate_other_classes_other_data_and_unknown_objects(trained, photos, capsys, tmp_path):
    assert main(["evaluate", "run", "--classes", "new", "--split", "train"]) == 0
    assert "12 images (train), 2 classes" in capsys.readouterr().out
    write_images(tmp_path / "elsewhere", {"white": (250, 250, 250), "red": COLOURS["red"]}, 5)
    write_images(tmp_path / "unknown" / "deep", {"nothing": (0, 0, 0)}, 5)
    assert main(["evaluate", "run", "elsewhere", "--split", "all", "--ood", "unknown"]) == 0
    out = capsys.readouterr().out
    assert "10 images (all), 2 classes" in out
    assert "FPR95 (%)" in out
    assert main(["evaluate", "run", "elsewhere", "--split", "all", "--ood", "unknown", "--fpr-rule", "gallop"]) == 0
    assert "FPR95 by GalLoP's rule (%)" in capsys.readouterr().out


def test_predict_names_images_with_probabilities(trained, photos, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(photos))
    assert main(["predict", "run", "~/test/green/0.png", "--top", "4"]) == 0
    out = capsys.readouterr().out
    shares = [float(part.rsplit(" ", 2)[1]) for part in out.split(": ")[1].strip().split(", ")]
    assert sum(shares) == pytest.approx(100, abs=0.3)
    assert shares == sorted(shares, reverse=True)


def test_class_names_that_are_no_list_of_names_are_refused(trained):
    for names, words in (("cat", "got one string: pass"), (["cat", 1], "expected strings, got 1")):
        with pytest.raises(InputError, match=f"class_names: .*{words}"):
            load_run("run", class_names=names)


def test_explain_draws_a_picture(trained, photos, capsys, tmp_path):
    image = str(photos / "test" / "green" / "0.png")
    assert main(["explain", "run", image, "--class-name", "dark blue"]) == 0
    with Image.open(tmp_path / "run" / "explained" / "0_dark_blue.png") as picture:
        assert picture.width > 2 * picture.height, "three panels side by side"
    assert main(["explain", "run", image, "--class-name", "purple"]) == 2
    assert "one of the 4 classes of this run (dark blue, green, red, yellow), got 'purple'" in capsys.readouterr().err


def test_using_a_run_on_nothing_is_said(trained, photos, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    image = str(photos / "test" / "green" / "0.png")
    for arguments, words in (
        (["predict", "run"], "images: expected image files or folders"),
        (["predict", "run", "empty"], "image folder empty: expected at least one image"),
        (["predict", "run", image, "--top", "0"], "top: expected at least 1"),
        (["evaluate", "run", "--ood", "empty"], "image folder empty: expected at least one image"),
        (["explain", "run", image, "--out", "map.xyz"], "out: expected a .png file"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err


def test_a_run_is_used_from_another_folder(trained, photos, capsys, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["evaluate", "../run"]) == 0


def test_explain_draws_one_map_for_a_method_without_local_prompts(photos, common, tmp_path):
    assert main(["train", "coop", str(photos), *common, "--out", "run"]) == 0
    assert main(["explain", "run", str(photos / "test" / "green" / "0.png"), "--out", "map.png"]) == 0
    with Image.open(tmp_path / "map.png") as picture:
        assert 1.5 * picture.height < picture.width < 2 * picture.height, "two panels side by side"


def split_file(photos, entries):
    (photos / "split_zhou_photos.json").write_text(json.dumps(entries))


def rename_class(photos, name):
    for split in ("train", "test"):
        (photos / split / "red").rename(photos / split / name)


def only_training_image(photos, path, label):
    test = [["test/red/0.png", 0, "red"]]
    split_file(photos, {"train": [[path, label, "red"]], "val": [], "test": test})


def nothing(photos):
    pass


BAD_INPUT = {
    "missing folder": (lambda photos: photos.rename(photos.with_name("gone")), [], "no such folder"),
    "empty class": (lambda photos: (photos / "train" / "blank").mkdir(), [], "blank"),
    "unreadable image": (lambda photos: (photos / "train/red/0.png").write_bytes(b"?"), ["--shots", "0"], "red/0.png"),
    "label out of range": (lambda photos: only_training_image(photos, "train/red/0.png", 7), [], "label 7"),
    "absent image": (lambda photos: only_training_image(photos, "train/red/99.png", 0), [], "train/red/99.png"),
    "unreadable test image": (lambda photos: (photos / "test/red/0.png").write_bytes(b"?"), [], "test/red/0.png"),
    "long template": (nothing, ["--zero-shot-template", "a " * 80 + "{}"], "is too long"),
    "long new class": (lambda photos: rename_class(photos, "z " * 75), ["--classes", "base"], "is too long"),
    "views of whole images": (nothing, ["--views", "2"], "views: expected at least 0, and 0 without --augment, got 2"),
    "no images at a time": (nothing, ["--image-batch", "0"], "image batch: expected at least 1"),
    "weights to unpickle": (
        lambda photos: Path("w.pt").write_bytes(b""),
        ["--backbone", "ViT-B-32", "--pretrained", "w.pt"],
        ".safetensors",
    ),
    "unknown backbone": (nothing, ["--backbone", "ViT-B-61"], "is not an architecture of open_clip"),
    "no weights": (nothing, ["--backbone", "ViT-B-32"], "needs weights"),
    "long class name": (lambda photos: rename_class(photos, "r " * 60), ["--context", "30"], "is too long"),
    "k below 1": (nothing, ["--k", "3", "0"], "k: expected"),
    "negative shots": (nothing, ["--shots", "-1"], "shots"),
    "no epochs": (nothing, ["--epochs", "0"], "epochs must be at least 1"),
    "huge seed": (nothing, ["--seed", str(10**30)], "seed: expected a whole number of at most 64 bits"),
    "no memory": (nothing, ["--image-memory", "nan"], "image_memory: expected a finite number, got nan"),
    "no user": (nothing, ["--split-file", "~nouser/x"], "path ~nouser/x: expected the name of a user behind ~"),
    "unknown device": (nothing, ["--device", "toaster"], "device: expected"),
    "template without a name": (nothing, ["--zero-shot-template", "a photo"], "template: expected"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_sentence_and_leaves_nothing(case, photos, common, capsys, tmp_path):
    spoil, flags, words = BAD_INPUT[case]
    spoil(photos)
    assert main(["train", "gallop", str(photos), *common, *flags, "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert "encoding" not in error or case.startswith("unreadable"), "before the long work"
    said = error.strip().splitlines()[-1]
    assert said.startswith("fastprompt: error: ")
    assert words in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bad_input_ends_a_process_with_status_2():
    command = [sys.executable, "-m", "fastprompt", "evaluate", "nowhere"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("fastprompt: error: nowhere must be a run folder")
    assert ended.stderr.count("\n") == 1


def test_a_module_and_its_version(capsys):
    said = subprocess.run([sys.executable, "-m", "fastprompt", "--version"], capture_output=True, text=True, check=True)
    assert said.stdout == f"fastprompt {__version__}\n"


def test_methods_are_taken_in_any_spelling_and_the_nearest_is_suggested(photos, common, capsys):
    assert main(["train", "CoOp", str(photos), *common, "--out", "run"]) == 0
    assert json.loads(Path("run/config.json").read_text())["method"] == "coop"
    assert main(["recipes", "show", "KgCoOp"]) == 0
    assert "kgcoop, recipe default" in capsys.readouterr().out
    assert main(["train", "galop", str(photos), *common]) == 2
    assert "got 'galop': did you mean gallop?" in capsys.readouterr().err


def test_changed_weights_are_noticed(trained, photos, model_folder, monkeypatch, capsys):
    from fastprompt.experiment import runs

    load = runs.load_backbone

    def other(*args, **kwargs):
        backbone = load(*args, **kwargs)
        backbone.fingerprint = "f" * 16
        return backbone

    monkeypatch.setattr(runs, "load_backbone", other)
    assert main(["predict", "run", str(photos / "test" / "red")]) == 2
    assert "but those found now have ffffffffffffffff" in capsys.readouterr().err


def test_doctor_tells_of_kernels_and_of_towers_without_causal_mask(capsys):
    assert main(["doctor", "--backbone", "ViT-B-16-SigLIP"]) == 0
    out = capsys.readouterr().out
    assert "the text tower is not causal" in out
    assert "topk_similarity impl='blocked'     usable" in out


def test_all_splits_together():
    from fastprompt.data import Dataset
    from fastprompt.experiment.sources import split_of

    def images(*names):
        return LabelledImages(names, tuple(range(len(names))), ("a", "b"))

    dataset = Dataset("d", images("x"), None, images("y", "z"))
    assert split_of(dataset, "all").paths == ("x", "y", "z")
    assert split_of(dataset, "all").labels == (0, 0, 1)

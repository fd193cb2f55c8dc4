"""The same command on other data: refused with what changed, in a finished run and in a stopped one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from fastprompt.cli import main
from fastprompt.files import LOCK, locked
from fastprompt.training import RunFolder
from tests.experiment.conftest import write_images


def another_class(photos):
    for split in ("train", "test"):
        write_images(photos / split, {"zinnober": (227, 66, 52)}, 4)


def renamed_class(photos):
    for split in ("train", "test"):
        (photos / split / "red").rename(photos / split / "scarlet")


def repaint(file):
    Image.fromarray(np.full((40, 48, 3), 77, np.uint8)).save(file)


CHANGES = {
    "class added": (another_class, "class_names[4] = (not set), but now class_names[4] = zinnober"),
    "class renamed": (renamed_class, "class_names[2] = red, but now class_names[2] = scarlet"),
    "training images changed": (
        lambda photos: [repaint(photos / "train" / "red" / f"{i}.png") for i in range(6)],
        "training_images = 16 images, sha256 ",
    ),
    "test image changed": (lambda photos: repaint(photos / "test/green/2.png"), "test_images = 16 images, sha256 "),
    "test image gone": (lambda photos: (photos / "test/green/2.png").unlink(), "but now test_images = 15 images"),
}


def everything(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("change", CHANGES)
def test_a_finished_run_is_not_shown_for_other_data(change, photos, common, capsys, tmp_path):
    spoil, words = CHANGES[change]
    command = ["train", "coop", str(photos), *common, "--out", "run"]
    assert main(command) == 0
    before = everything(tmp_path / "run")
    spoil(photos)
    capsys.readouterr()
    assert main(command) == 2
    said = capsys.readouterr()
    assert words in said.err and "go back to the old value" in said.err and not said.out.count("accuracy")
    assert everything(tmp_path / "run") == before


def test_a_finished_run_is_not_shown_for_other_weights(photos, common, model_folder, capsys, tmp_path):
    own = shutil.copytree(model_folder, tmp_path / "model") / "open_clip_model.safetensors"
    command = ["train", "coop", str(photos), "--backbone", f"local-dir:{own.parent}", *common[2:], "--out", "run"]
    assert main(command) == 0
    before, weights = everything(tmp_path / "run"), load_file(own)
    save_file(weights | {"text_projection": 2 * weights["text_projection"]}, own)
    assert main(command) == 2
    old = json.loads(Path("run", "config.json").read_text())["weights"]
    assert f"holds a run with weights = {old}, but now weights = " in capsys.readouterr().err
    assert everything(tmp_path / "run") == before


def test_files_that_only_moved_are_the_same_data(photos, common, capsys):
    assert main(["train", "coop", str(photos), *common, "--out", "run"]) == 0
    for file in (photos / "test" / "red").iterdir():
        file.rename(file.with_name(f"moved {file.name}"))
    assert main(["train", "coop", str(photos), *common, "--out", "run"]) == 0


def test_changed_descriptions_are_noticed_however_their_file_is_named(photos, common, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    entries = {name: [f"a {name} picture"] for name in ("dark blue", "green", "red", "yellow")}
    (tmp_path / "said.json").write_text(json.dumps(entries))
    command = ["train", "dualpt", str(photos), *common, "--out", str(tmp_path / "run"), "--descriptions"]
    assert main([*command, "~/said.json"]) == 0
    (tmp_path / "below").mkdir()
    monkeypatch.chdir("below")
    assert main([*command, "../said.json"]) == 0
    (tmp_path / "said.json").write_text(json.dumps(entries | {"red": ["something else"]}))
    assert main([*command, "~/said.json"]) == 2
    assert "descriptions_contents = sha256 " in capsys.readouterr().err


def test_links_that_go_in_a_circle_are_one_sentence(photos, common, capsys, tmp_path):
    Path("said.json").symlink_to("said.json")
    arguments = ["train", "dualpt", str(photos), *common, "--out", "run"]
    for option in ("--descriptions", "--recipe"):
        assert main([*arguments, option, "said.json"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_words_that_are_the_name_of_a_file_are_words(photos, common, tmp_path):
    (tmp_path / "photo").write_text("a file")
    assert main(["train", "coop", str(photos), *common, "--context", "photo", "--out", "run"]) == 0
    (tmp_path / "photo").write_text("another one")
    assert main(["train", "coop", str(photos), *common, "--context", "photo", "--out", "run"]) == 0
    long = "photograph " * 25 + "{}"  # no file could have this name
    assert main(["train", "kgcoop", str(photos), *common, "--template", long, "--out", "long"]) == 0


@pytest.mark.slow
def test_a_second_process_on_a_run_names_the_first(photos, common, capsys, tmp_path):
    program = "import sys; from fastprompt.cli import main; sys.exit(main(sys.argv[1:]))"
    command = ["train", "coop", str(photos), *common, "--epochs", "1000000", "--out", "run"]
    first = subprocess.Popen([sys.executable, "-c", program, *command], stderr=subprocess.PIPE)
    while not (tmp_path / "run" / "config.json").exists():
        assert first.poll() is None
        time.sleep(0.05)
    assert main(command) == 2
    assert f"but process {first.pid} on " in capsys.readouterr().err
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert Path("run", LOCK).exists()
    assert main([*command[:-4], "--epochs", "3", "--out", "run"]) == 2
    assert "epochs = 1000000, but now epochs = 3" in capsys.readouterr().err
    with locked(tmp_path / "run"):  # the lock of a killed process is nobody's
        pass


def test_a_cache_that_was_filled_in_other_batches_is_noticed_on_resume(photos, common, caplog, tmp_path, monkeypatch):
    command = ["train", "coop", str(photos), *common, "--out", "run"]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_model", interrupt)
        assert main(command) == 130
        assert main([*command, "--image-batch", "1"]) == 130
        assert "last bits" not in caplog.text  # the features are those of before
        shutil.rmtree(tmp_path / "cache")
    assert main([*command, "--image-batch", "1"]) == 0
    assert (
        "run goes on, but may end with other last bits than unstopped: origin was cached features with" in caplog.text
    )


def test_a_run_that_diverged_goes_on_with_a_smaller_lr_and_nothing_else(photos, common, capsys):
    command = ["train", "coop", str(photos), *common, "--epochs", "4", "--out", "run"]
    assert main([*command, "--lr", "1e38"]) == 2
    assert "keeps the state before, and goes on with a smaller lr than 1e+38" in capsys.readouterr().err
    assert main([*command, "--lr", "0.002", "--weight-decay", "0.1"]) == 2
    assert "lr = 1e+38, but now lr = 0.002" in capsys.readouterr().err
    assert main([*command, "--lr", "0.002"]) == 0
    config = json.loads(Path("run", "config.json").read_text())
    assert config["lr"] == 0.002 and config["diverged"] == [{"until_epoch": 1, "lr": 1e38}]
    assert main([*command, "--lr", "0.002"]) == 0

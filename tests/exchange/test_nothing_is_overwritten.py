"""Import and export replace nothing that is somebody's, and leave nothing half done."""

import pytest
import torch

from fastprompt import files
from fastprompt.cli import main
from fastprompt.files import locked
from tests.exchange.conftest import save_dassl
from tests.exchange.test_import import backbone, bring_in, names, start  # noqa: F401


def everything(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def run(start, model_folder, names, common, tmp_path):  # noqa: F811
    """An imported run."""
    save_dassl(tmp_path / "c", {"ctx": torch.ones(4, 48)}, {"token_prefix": start.expand(4, 1, -1).clone()})
    assert bring_in(tmp_path / "c", model_folder, "--class-names", names) == 0
    return tmp_path / "run"


def test_the_same_import_again_changes_nothing(run, model_folder, names, tmp_path):  # noqa: F811
    before = everything(run)
    assert bring_in(tmp_path / "c", model_folder, "--class-names", names) == 0
    assert everything(run) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("names", "class_names[2] = red, but now class_names[2] = fox"),
        ("position", "options.position = end, but now options.position = front"),
        ("checkpoint", "checkpoint = sha256 "),
    ],
)
def test_another_import_into_the_folder_is_refused(change, words, run, start, model_folder, names, tmp_path, capsys):  # noqa: F811
    before = everything(run)
    if change == "names":
        names.write_text(names.read_text().replace("red", "fox"))
    if change == "checkpoint":
        save_dassl(tmp_path / "c", {"ctx": 2 * torch.ones(4, 48)}, {"token_prefix": start.expand(4, 1, -1).clone()})
    more = ["--position", "front"] if change == "position" else []
    assert bring_in(tmp_path / "c", model_folder, "--class-names", names, *more) == 2
    assert words in capsys.readouterr().err
    assert everything(run) == before


def test_an_import_into_a_trained_run_is_refused(photos, start, model_folder, names, common, tmp_path, capsys):  # noqa: F811
    assert main(["train", "coop", str(photos), *common, "--out", "run"]) == 0
    before = everything(tmp_path / "run")
    save_dassl(tmp_path / "c", {"ctx": torch.ones(4, 48)}, {"token_prefix": start.expand(4, 1, -1).clone()})
    assert bring_in(tmp_path / "c", model_folder, "--class-names", names) == 2
    assert "run holds a run with " in capsys.readouterr().err
    assert everything(tmp_path / "run") == before


@pytest.mark.parametrize("flags", [[], ["--force"]])
@pytest.mark.parametrize("name", ["model.safetensors", "Model.safetensors", "training_state.safetensors"])
def test_an_export_never_takes_the_name_of_a_file_of_a_run(flags, name, run, capsys):
    before = everything(run)
    assert main(["export", "run", "--out", f"run/{name}", *flags]) == 2
    assert f"expected another name than that of a file of the run run, got {name}" in capsys.readouterr().err
    assert everything(run) == before


@pytest.mark.parametrize("suffix", ["safetensors", pytest.param("onnx", marks=pytest.mark.slow)])
def test_an_existing_file_is_replaced_by_force_alone(suffix, run, tmp_path, capsys):
    if suffix == "onnx":
        pytest.importorskip("onnxscript", reason="onnx and onnxscript are not installed")
    file = tmp_path / f"theirs.{suffix}"
    file.write_bytes(b"dear")
    command = ["export", "run", "--out", str(file)]
    assert main(command) == 2
    assert "expected a new file, or --force to replace this one" in capsys.readouterr().err
    assert file.read_bytes() == b"dear"
    assert main([*command, "--force"]) == 0
    written = file.stat().st_mtime_ns
    assert main(command) == 0  # it is this file already
    assert file.stat().st_mtime_ns == written
    assert main([*command, "--class-names", "cat", "dog"]) == 2


def test_a_second_process_that_exports_into_a_folder_is_told(run, tmp_path, capsys):
    with locked(tmp_path / "there"):
        assert main(["export", "run", "--out", "there/head.safetensors"]) == 2
    assert "there: expected no other process to write here" in capsys.readouterr().err
    assert not (tmp_path / "there").exists()


def test_a_full_disk_leaves_no_half_of_a_file(run, tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    assert main(["export", "run", "--out", "there/head.safetensors"]) == 2
    assert "head.safetensors: cannot be written (No space left on device)" in capsys.readouterr().err
    assert not (tmp_path / "there").exists()

import json
import platform
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fastprompt.errors import InputError
from fastprompt.files import LOCK, TEMPORARY, read_tensors, write_tensors
from fastprompt.training import RunFolder, epoch_metrics
from fastprompt.training.state import TrainingState
from fastprompt.version import __version__

CONFIG = {"method": "toy", "training": {"lr": 0.1, "k": (5, 10)}, "data": Path("images")}


def make_state(**changes):
    values = {"class_names": ("a", "b"), "fingerprint": "f00d", "labels": torch.tensor([0, 1, 0]), "origin": "memory"}
    values |= {"epoch": 1, "step": 2, "seconds": 0.1 + 0.2, "optimizer": {}}
    values |= {"losses": torch.tensor([1.5, 2.5]), "correct": torch.tensor([1, 0])}
    values |= {"learned": {"a.weight": torch.randn(3, 2).T}}
    return TrainingState(**values | changes)


@pytest.fixture
def run(tmp_path):
    """A run that exists on disk."""
    run = RunFolder.create_or_resume(tmp_path / "runs" / "a", CONFIG)
    run.log("epoch", epoch=1, loss=0.5)
    return run


def test_folder_appears_with_the_first_write_and_is_resumed(tmp_path):
    run = RunFolder.create_or_resume(tmp_path / "runs" / "a", CONFIG)
    assert not (tmp_path / "runs").exists() and not run.complete
    run.log("epoch", epoch=1)
    assert sorted(file.name for file in run.path.iterdir()) == ["config.json", "environment.json", "metrics.jsonl"]
    again = RunFolder.create_or_resume(run.path, CONFIG)
    assert again.metrics() == [{"kind": "epoch", "epoch": 1}]
    assert json.loads((run.path / "config.json").read_text()) == again.config
    assert again.config == {"method": "toy", "training": {"lr": 0.1, "k": [5, 10]}, "data": "images"}


def test_existing_empty_folder_is_used(tmp_path):
    RunFolder.create_or_resume(tmp_path, CONFIG).log("epoch", epoch=1)
    assert RunFolder.open(tmp_path).config["method"] == "toy"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CONFIG | {"training": {"lr": 0.2, "k": (5, 10)}}, r"training\.lr = 0\.1, but now training\.lr = 0\.2"),
        (CONFIG | {"training": {"lr": 0.1, "k": (5, 20)}}, r"training\.k = \[5, 10\], but now training\.k = \[5, 20\]"),
        (CONFIG | {"seed": 1}, r"seed = \(not set\), but now seed = 1"),
        ({"method": "toy", "training": CONFIG["training"]}, r"data = images, but now data = \(not set\)"),
    ],
)
def test_another_config_is_refused_by_name(run, config, words):
    before = {file: file.read_bytes() for file in run.path.iterdir()}
    with pytest.raises(InputError, match=words + ": choose another --out"):
        RunFolder.create_or_resume(run.path, config)
    assert {file: file.read_bytes() for file in run.path.iterdir()} == before


def test_a_class_name_that_changed_is_refused_by_its_number(tmp_path):
    RunFolder.create_or_resume(tmp_path, {"class_names": ["cat", "dog"]}).log("epoch", epoch=1)
    for names, words in (
        (["cat", "fox"], r"class_names\[1\] = dog, but now class_names\[1\] = fox"),
        (["cat", "dog", "fox"], r"class_names\[2\] = \(not set\), but now class_names\[2\] = fox"),
    ):
        with pytest.raises(InputError, match=words):
            RunFolder.create_or_resume(tmp_path, {"class_names": names})


@pytest.mark.parametrize(
    "left", [(), (LOCK,), ("environment.json",), ("environment.json", f".config.json.1f{TEMPORARY}")]
)
def test_a_half_made_folder_is_taken_over(tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("{}")
    RunFolder.create_or_resume(tmp_path, CONFIG).log("epoch", epoch=1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "environment.json", "metrics.jsonl"]
    assert RunFolder.open(tmp_path).environment()["torch"] == torch.__version__


def test_a_state_that_a_killed_process_left_beside_its_model_is_removed(run, toy):
    run.save_state(make_state())
    state = (run.path / "training_state.safetensors").read_bytes()
    run.save_model(toy.learner())
    (run.path / "training_state.safetensors").write_bytes(state)
    with RunFolder.create_or_resume(run.path, CONFIG).locked():
        assert not (run.path / "training_state.safetensors").exists()


def test_one_process_writes_and_others_read(run, toy):
    other = RunFolder.create_or_resume(run.path, CONFIG)
    with run.locked(), run.locked():
        run.log("epoch", epoch=2)
        assert [line["epoch"] for line in other.metrics()] == [1, 2]
        for write in (
            lambda: other.log("epoch", epoch=3),
            lambda: toy.fit(toy.learner(), toy.source(), toy.settings(), run=other),
        ):
            with pytest.raises(InputError, match="expected no other process to write here, but process"):
                write()
    other.log("epoch", epoch=3)
    assert len(run.metrics()) == 3


def test_a_run_that_another_process_made_meanwhile_is_not_written_into(tmp_path):
    early = RunFolder.create_or_resume(tmp_path, CONFIG | {"seed": 2})
    RunFolder.create_or_resume(tmp_path, CONFIG | {"seed": 1}).log("epoch", epoch=1)
    with pytest.raises(InputError, match="holds a run with seed = 1, but now seed = 2"):
        early.log("epoch", epoch=1)


def test_foreign_folders_and_files_are_refused(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"x")
    for path in (tmp_path, tmp_path / "photo.png"):
        with pytest.raises(InputError, match="something else: choose another --out"):
            RunFolder.create_or_resume(path, CONFIG)
    with pytest.raises(InputError, match="must be a run folder"):
        RunFolder.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # many programs write one
    with pytest.raises(InputError, match="something else"):
        RunFolder.create_or_resume(tmp_path, CONFIG)
    with pytest.raises(InputError, match="must be a run folder"):
        RunFolder.open(tmp_path / "absent")


@pytest.mark.parametrize("content", [b'{"method"', b"[1]", b"\xff"])
def test_damaged_config_and_metrics_name_the_file(run, content):
    (run.path / "metrics.jsonl").write_bytes(b'{"kind": "epoch"}\n' + content + b"\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl(, line 2)?: expected (JSON|a JSON|text in UTF-8)"):
        run.metrics()
    (run.path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json: expected (JSON|a JSON|text in UTF-8)"):
        RunFolder.create_or_resume(run.path, CONFIG)


def test_state_comes_back_exactly(run):
    state = make_state(optimizer={"momentum_buffer.a.weight": torch.randn(2, 3), "step.a.weight": torch.tensor(3.0)})
    run.save_state(state)
    back = run.load_state()
    assert (back.class_names, back.origin) == (("a", "b"), "memory") and torch.equal(back.labels, state.labels)
    assert (back.epoch, back.step, back.seconds) == (1, 2, 0.1 + 0.2)
    assert torch.equal(back.losses, state.losses) and torch.equal(back.correct, state.correct)
    assert back.learned.keys() == {"a.weight"} and back.optimizer.keys() == state.optimizer.keys()
    assert torch.equal(back.learned["a.weight"], state.learned["a.weight"])
    assert all(torch.equal(back.optimizer[name], state.optimizer[name]) for name in state.optimizer)
    assert back.optimizer_state(["b", "a.weight"])[1]["step"] == 3


def test_damaged_or_foreign_state_is_refused(run, toy):
    file = run.path / "training_state.safetensors"
    run.save_state(make_state())
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(InputError, match="expected a safetensors file, got one that is damaged"):
        run.load_state()
    run.save_model(toy.learner())
    (run.path / "model.safetensors").rename(file)
    with pytest.raises(InputError, match=r"expected a value 'class_names', got none"):
        run.load_state()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": -1}, "expected numbers of at least 0, got epoch 1, step -1"),
        ({"epoch": -1}, "expected numbers of at least 0, got epoch -1, step 2"),
        ({"seconds": float("nan")}, "expected numbers of at least 0"),
        ({"epoch": "x"}, "epoch: expected int, got 'x'"),
        ({"step": 3}, r"losses: expected finite numbers, torch.float32 \(3,\), got torch.float32 \(2,\)"),
        ({"losses": torch.tensor([1.5, float("nan")])}, "losses: expected finite numbers"),
        ({"labels": torch.ones(3)}, "labels: expected finite numbers, torch.int64"),
        ({"optimizer": {"step.b": torch.ones(())}}, "learned tensors: expected a value 'b', got none"),
        (
            {"optimizer": {"exp_avg.a.weight": torch.ones(3)}},
            r"exp_avg of a.weight: expected .* \(2, 3\), got .* \(3,\)",
        ),
    ],
)
def test_a_state_that_no_training_leaves_is_refused(run, change, words):
    run.save_state(make_state(**change))
    with pytest.raises(InputError, match=words):
        run.load_state()


def test_a_state_of_an_older_version_is_refused(run):
    """It called SGD's buffers otherwise, and a training without them would end with other numbers."""
    run.save_state(make_state())
    file = run.path / "training_state.safetensors"
    tensors, metadata = read_tensors(file, "training state")
    write_tensors(file, tensors | {"momentum.a.weight": torch.ones(2, 3)}, metadata)
    with pytest.raises(InputError, match=r"expected no tensor 'momentum\.a\.weight'"):
        run.load_state()


def test_a_state_that_is_there_but_no_file_is_not_taken_for_none(run):
    assert run.load_state() is None
    (run.path / "training_state.safetensors").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"training state .* expected a file, got no such file"):
        run.load_state()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"kind": "epoch", "epoch": "x"}, "line 1: epoch: expected int, got 'x'"),
        ({"kind": "epoch", "epoch": 1, "surprise": 1}, "metrics.jsonl: expected a value 'loss', got none"),
    ],
)
def test_metrics_of_other_types_are_refused(run, line, words):
    (run.path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=words):
        epoch_metrics(run)


def test_model_holds_tensors_and_metadata_and_completes_the_run(run, toy):
    learner = toy.learner()
    torch.nn.init.normal_(learner.weight)
    run.save_state(make_state())
    with pytest.raises(InputError, match="has not finished training"):
        run.load_model()
    run.save_model(learner, Path("weights"))
    assert run.complete and not (run.path / "training_state.safetensors").exists()
    tensors, described = run.load_model()
    assert tensors.keys() == {"weight", "bias"} and torch.equal(tensors["weight"], learner.weight)
    assert asdict(described) == {
        "method": "toy", "class_names": ["class 0", "class 1", "class 2", "class 3"], "backbone": "toy-tower",
        "pretrained": None, "fingerprint": "f00d", "options": {"k": [5, 10]}, "patches": "value",
        "weights_dir": str(Path("weights").resolve()),
    }  # fmt: skip
    with safe_open(run.path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["fastprompt"]) == asdict(described)


def test_foreign_model_is_refused(run, toy):
    run.save_state(make_state())
    (run.path / "training_state.safetensors").rename(run.path / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: expected a JSON object"):
        run.load_model()


def test_a_learner_without_tensors_can_be_saved(run, toy):
    learner = toy.learner()
    del learner.weight, learner.bias
    run.save_model(learner)
    assert run.load_model()[0] == {}


def test_metrics_of_one_kind(run):
    run.log("evaluation", accuracy=0.25)
    assert run.metrics("evaluation") == [{"kind": "evaluation", "accuracy": 0.25}]
    assert [line["kind"] for line in run.metrics()] == ["epoch", "evaluation"]


def test_environment_is_that_of_the_start(run, monkeypatch):
    before = (run.path / "environment.json").read_text()
    monkeypatch.setattr("sys.argv", ["fastprompt", "train", "--again"])
    RunFolder.create_or_resume(run.path, CONFIG).log("epoch", epoch=2)
    assert (run.path / "environment.json").read_text() == before


def test_environment_is_recorded(run):
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["fastprompt"] == __version__
    assert environment["torch"] == torch.__version__
    assert environment["python"] == platform.python_version()
    assert {"triton", "open_clip", "platform", "processor", "device", "commit", "date", "command"} <= environment.keys()

"""A run that was stopped anywhere ends with the numbers of a run that was not."""

import dataclasses
import json
import math
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from fastprompt.errors import InputError
from fastprompt.learners import GalLoP
from fastprompt.sources import ImageSource
from fastprompt.training import Interrupted, TrainingSettings, fit
from fastprompt.training.interrupt import InterruptFlag

STEPS = 5  # of an epoch: 44 images in batches of 8


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def straight(toy, path, **settings):
    learner, run = toy.learner(), toy.run(path)
    result = toy.fit(learner, toy.source(), toy.settings(**settings), run=run)
    run.save_model(learner)
    return learner, result, run


def without_clock(epochs):
    return [(epoch.epoch, epoch.loss, epoch.accuracy, epoch.lr) for epoch in epochs]


# First step, inside an epoch, last step of one, last step of all.
@pytest.mark.parametrize(("call", "optimizer"), [(1, "SGD"), (8, "SGD"), (10, "SGD"), (20, "SGD"), (8, "AdamW")])
def test_interrupted_run_ends_bitwise_like_a_straight_one(toy, tmp_path, call, optimizer):
    expected, expected_result, expected_run = straight(toy, tmp_path / "straight", optimizer=optimizer)
    settings = toy.settings(optimizer=optimizer)
    path = tmp_path / "stopped"
    with pytest.raises(Interrupted) as stop:
        toy.fit(toy.learner(), toy.source(at_call={call: press_ctrl_c}), settings, run=toy.run(path))
    assert (stop.value.epoch - 1) * STEPS + stop.value.step == call
    assert str(path) in str(stop.value) and f"epoch {stop.value.epoch} of 4 after step {stop.value.step}" in str(
        stop.value
    )
    state = toy.run(path).load_state()
    assert state.epoch * STEPS + state.step == call

    learner, run = toy.learner(), toy.run(path)
    source = toy.source()
    result = toy.fit(learner, source, settings, run=run)
    run.save_model(learner)
    assert len(source.features.asked) == 4 * STEPS - call  # no step twice
    for name, tensor in expected.state_dict().items():
        assert torch.equal(learner.state_dict()[name], tensor), name
    assert without_clock(result.epochs) == without_clock(expected_result.epochs)
    assert [line["epoch"] for line in run.metrics("epoch")] == [1, 2, 3, 4]
    assert (path / "model.safetensors").read_bytes() == (expected_run.path / "model.safetensors").read_bytes()


def test_gallop_with_its_prompt_dropout_resumes_bitwise(toy, tmp_path, vit_backbone):
    generator = torch.Generator().manual_seed(2)
    pixels, labels = torch.randn(8, 3, 32, 32, generator=generator).double(), torch.arange(8) % 2

    def read(paths, generator):
        return pixels[[int(path.stem) for path in paths]]

    plain = ImageSource([Path(f"{i}.png") for i in range(8)], labels, read=read, backbone=vit_backbone)
    settings = toy.settings(epochs=3, batch_size=4, lr=0.002, warmup_epochs=0)

    def train(path, source):
        learner = GalLoP(vit_backbone, ["cat", "hot dog"], k=(2, 5))
        toy.fit(learner, source, settings, run=toy.run(path))
        return learner.state_dict()

    calls = iter(range(1, 100))

    def read_and_press(paths, generator):
        if next(calls) == 3:
            press_ctrl_c()
        return read(paths, generator)

    stopped = ImageSource(plain.paths, labels, read=read_and_press, backbone=vit_backbone)
    with pytest.raises(Interrupted, match="epoch 2 of 3 after step 1 of 2"):
        train(tmp_path / "stopped", stopped)
    expected, resumed = train(tmp_path / "straight", plain), train(tmp_path / "stopped", plain)
    start = GalLoP(vit_backbone, ["cat", "hot dog"], k=(2, 5)).state_dict()
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), name
        assert not torch.equal(start[name], tensor), name


def test_killed_run_repeats_its_epoch_without_double_lines(toy, tmp_path):
    expected, _, _ = straight(toy, tmp_path / "straight")
    path = tmp_path / "killed"

    def die(metrics):
        run.log("evaluation", epoch=metrics.epoch, accuracy=0.5)
        if metrics.epoch == 3:
            raise SystemExit  # after the lines of epoch 3, before its state

    run = toy.run(path)
    with pytest.raises(SystemExit):
        toy.fit(toy.learner(), toy.source(), toy.settings(), run=run, on_epoch=die)
    assert [line["epoch"] for line in run.metrics()] == [1, 1, 2, 2, 3, 3]
    learner, run = toy.learner(), toy.run(path)
    toy.fit(learner, toy.source(), toy.settings(), run=run)
    assert torch.equal(learner.weight, expected.weight)
    assert [(line["kind"], line["epoch"]) for line in run.metrics()] == [
        ("epoch", 1), ("evaluation", 1), ("epoch", 2), ("evaluation", 2), ("epoch", 3), ("epoch", 4),
    ]  # fmt: skip


def test_ctrl_c_between_epochs(toy, tmp_path):
    run = toy.run(tmp_path / "run")
    with pytest.raises(Interrupted) as stop:
        toy.fit(toy.learner(), toy.source(), toy.settings(), run=run, on_epoch=lambda metrics: press_ctrl_c())
    assert (stop.value.epoch, stop.value.step) == (1, STEPS)
    assert (run.load_state().epoch, run.load_state().step) == (1, 0)


def test_progress_bar_goes_on_where_it_was(toy, tmp_path, capsys, monkeypatch):
    with pytest.raises(Interrupted):
        toy.fit(toy.learner(), toy.source(at_call={7: press_ctrl_c}), toy.settings(), run=toy.run(tmp_path / "run"))
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    fit(toy.learner(), toy.source(), toy.settings(), run=toy.run(tmp_path / "run"), progress=True)
    bar = capsys.readouterr().err
    assert "7/20" in bar and "20/20" in bar


def test_ctrl_c_without_a_run_folder_says_so(toy):
    with pytest.raises(Interrupted, match="epoch 1 of 4 after step 2 of 5: nothing was saved"):
        toy.fit(toy.learner(), toy.source(at_call={2: press_ctrl_c}), toy.settings())


def test_sigterm_saves_like_ctrl_c_and_says_which_it_was(toy, tmp_path):
    handler, run = signal.getsignal(signal.SIGTERM), toy.run(tmp_path / "run")
    terminate = {7: lambda: os.kill(os.getpid(), signal.SIGTERM)}
    with pytest.raises(Interrupted, match=r"^terminated in epoch 2 of 4 after step 2 of 5: .*resumes it") as stop:
        toy.fit(toy.learner(), toy.source(at_call=terminate), toy.settings(), run=run)
    assert stop.value.signal == signal.SIGTERM
    assert (run.load_state().epoch, run.load_state().step) == (1, 2)
    assert signal.getsignal(signal.SIGTERM) is handler


def test_second_ctrl_c_stops_at_once_and_the_handler_comes_back(toy, tmp_path):
    def twice():
        press_ctrl_c()
        press_ctrl_c()

    handler = signal.getsignal(signal.SIGINT)
    run = toy.run(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt) as stop:
        toy.fit(toy.learner(), toy.source(at_call={7: twice}), toy.settings(), run=run)
    assert not isinstance(stop.value, Interrupted)
    assert run.load_state().epoch == 1 and run.load_state().step == 0
    assert signal.getsignal(signal.SIGINT) is handler


def test_training_in_another_thread_leaves_signals_alone(toy):
    handler, seen, errors = signal.getsignal(signal.SIGINT), [], []
    source = toy.source(at_call={1: lambda: seen.append(signal.getsignal(signal.SIGINT))})

    def train():
        try:
            toy.fit(toy.learner(), source, toy.settings())
        except ValueError as error:  # what signal.signal raises outside the main thread
            errors.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert not errors and seen == [handler] and len(source.features.asked) == 4 * STEPS


def test_flag_is_set_by_the_first_signal():
    with InterruptFlag() as interrupt:
        assert not interrupt.requested
        press_ctrl_c()
        assert interrupt.requested


def test_complete_run_is_loaded_not_trained(toy, tmp_path):
    expected, expected_result, _ = straight(toy, tmp_path / "run")
    learner, source, run = toy.learner(), toy.source(), toy.run(tmp_path / "run")
    assert run.complete and run.load_state() is None
    result = toy.fit(learner, source, toy.settings(), run=run)
    assert not source.features.asked
    assert torch.equal(learner.weight, expected.weight)
    assert result == expected_result


def test_other_data_or_another_learner_is_refused(toy, tmp_path):
    with pytest.raises(Interrupted):
        toy.fit(toy.learner(), toy.source(at_call={7: press_ctrl_c}), toy.settings(), run=toy.run(tmp_path / "run"))
    with pytest.raises(InputError, match="44 training images, but now there are 40"):
        toy.fit(toy.learner(), toy.source(n=40), toy.settings(), run=toy.run(tmp_path / "run"))
    relabelled = toy.source()
    relabelled.labels = relabelled.labels.flip(0)
    with pytest.raises(InputError, match="made with other labels of its 44 training images than there are now"):
        toy.fit(toy.learner(), relabelled, toy.settings(), run=toy.run(tmp_path / "run"))
    with pytest.raises(InputError, match=r"training_state\.safetensors: expected the learned tensors"):
        toy.fit(toy.learner(width=9), toy.source(), toy.settings(), run=toy.run(tmp_path / "run"))
    with pytest.raises(InputError, match="made with None as class 4, but now that is 'class 4'"):
        toy.fit(toy.learner(classes=5), toy.source(), toy.settings(), run=toy.run(tmp_path / "run"))
    renamed = toy.learner()
    renamed.class_names = (*renamed.class_names[:2], "fox", "class 3")
    with pytest.raises(InputError, match="made with 'class 2' as class 2, but now that is 'fox'"):
        toy.fit(renamed, toy.source(), toy.settings(), run=toy.run(tmp_path / "run"))
    other_weights = toy.learner()
    other_weights.backbone.fingerprint = "beef"
    with pytest.raises(InputError, match="made on weights with fingerprint f00d, but those now have beef"):
        toy.fit(other_weights, toy.source(), toy.settings(), run=toy.run(tmp_path / "run"))


def test_what_changes_last_bits_is_said_on_resume(toy, tmp_path, caplog):
    with pytest.raises(Interrupted):
        toy.fit(toy.learner(), toy.source(at_call={7: press_ctrl_c}), toy.settings(), run=toy.run(tmp_path / "run"))
    with pytest.raises(Interrupted):
        toy.fit(toy.learner(), toy.source(at_call={1: press_ctrl_c}), toy.settings(), run=toy.run(tmp_path / "run"))
    assert "last bits" not in caplog.text
    source = toy.source()
    source.origin = "images encoded 3 at a time"
    torch.set_num_threads(2)
    toy.fit(toy.learner(), source, toy.settings(), run=toy.run(tmp_path / "run"))
    said = caplog.text.strip()
    assert "run goes on, but may end with other last bits than unstopped: threads was 1, is 2; " in said
    assert said.endswith("origin was rows without a checksum, is images encoded 3 at a time")


def test_a_diverged_run_goes_on_from_its_last_state_with_a_smaller_lr(toy, tmp_path):
    """Epochs 1 and 2 at lr 0.5 and the others at 0.1, as if nothing had happened between."""

    class TwoRates(TrainingSettings):
        def learning_rate(self, epoch):
            return toy.settings(lr=0.5 if epoch < 2 else 0.1).learning_rate(epoch)

    expected = toy.learner()
    toy.fit(expected, toy.source(), TwoRates(**dataclasses.asdict(toy.settings())))

    def run(lr, seed=1):
        return toy.run(tmp_path / "run", lr=lr, seed=seed)

    diverging, plain, calls = toy.learner(), toy.learner().loss, []
    plain = diverging.loss
    diverging.loss = lambda scores, labels, *_: (
        plain(scores, labels) * (math.nan if calls.append(0) or len(calls) == 13 else 1)
    )
    with pytest.raises(InputError, match=r"step 3 of epoch 3 .*run keeps the state before"):
        toy.fit(diverging, toy.source(), toy.settings(lr=0.5), run=run(0.5))
    for lr, seed, words in ((0.6, 1, "lr = 0.5, but now lr = 0.6"), (0.1, 2, "lr = 0.5, but now lr = 0.1")):
        with pytest.raises(InputError, match=words):
            run(lr, seed)
    learner = toy.learner()
    toy.fit(learner, toy.source(), toy.settings(lr=0.1), run=run(0.1))
    assert torch.equal(learner.weight, expected.weight) and torch.equal(learner.bias, expected.bias)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config == {"lr": 0.1, "seed": 1, "diverged": [{"until_epoch": 2, "lr": 0.5}]}
    assert [line["kind"] for line in run(0.1).metrics()] == ["epoch"] * 4
    with pytest.raises(InputError, match=r"lr = 0\.1, but now lr = 0\.05"):
        run(0.05)  # it does not diverge any more


def test_a_run_that_fails_on_its_input_leaves_nothing(toy, tmp_path):
    with pytest.raises(InputError):
        toy.fit(toy.learner(classes=3), toy.source(), toy.settings(), run=toy.run(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_metrics_are_json_lines(toy, tmp_path):
    _, result, run = straight(toy, tmp_path / "run")
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [epoch.loss for epoch in result.epochs]
    assert {line["kind"] for line in lines} == {"epoch"}

import math
from itertools import chain

import pytest
import torch
from torch.nn import functional as F

from fastprompt.errors import InputError
from fastprompt.training import fit


def test_loss_falls_and_predictions_are_learned(toy):
    learner = toy.learner()
    result = toy.fit(learner, toy.source(), toy.settings(epochs=20))
    losses = [epoch.loss for epoch in result.epochs]
    assert losses[0] == pytest.approx(math.log(4), rel=0.1)  # weights start at zero
    assert losses[-1] < 0.7 * losses[0]
    assert result.epochs[-1].accuracy > 0.95
    assert result.seconds == sum(epoch.seconds for epoch in result.epochs) > 0
    assert all(epoch.peak_memory_bytes > 10 * 2**20 for epoch in result.epochs)


def test_a_learner_is_prepared_before_the_first_step_and_makes_its_own_gradients(toy):
    class Still(toy.learner):
        def backward(self, scores, labels, *, generator=None):
            assert self.prepared_on == 44
            self.weight.grad, self.bias.grad = torch.zeros_like(self.weight), torch.ones_like(self.bias)
            return torch.tensor(7.0)

    learner = Still()
    result = toy.fit(learner, toy.source(), toy.settings(epochs=1, warmup_epochs=0, momentum=0.0, weight_decay=0.0))
    assert result.epochs[0].loss == 7.0
    assert not learner.weight.any()
    assert learner.bias.tolist() == pytest.approx([-0.5 * 5] * 4)  # lr 0.5, five steps of 8 images


def test_steps_are_sgd_with_momentum_weight_decay_and_the_schedule(toy):
    """Three epochs of one full batch against the equations of SGD, written out."""
    learner, source = toy.learner(), toy.source(n=8)
    learner.loss = lambda scores, labels, *_: F.cross_entropy(scores.logits, labels)
    torch.nn.init.ones_(learner.bias)
    settings = toy.settings(epochs=3, warmup_epochs=1, lr=0.5, warmup_lr=0.1, momentum=0.9, weight_decay=0.1)
    expected = {name: tensor.detach().clone().requires_grad_() for name, tensor in learner.named_parameters()}
    velocity = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    losses, rates = [], [0.1, 0.5, 0.375]  # warm-up, then 0.5 (1 + cos(0)) / 2 and 0.5 (1 + cos(pi / 3)) / 2
    for lr in rates:
        logits = source.features.pooled @ expected["weight"].T + expected["bias"]
        losses.append(F.cross_entropy(logits, source.labels))
        gradients = torch.autograd.grad(losses[-1], list(expected.values()))
        for (name, tensor), gradient in zip(expected.items(), gradients, strict=True):
            velocity[name] = 0.9 * velocity[name] + gradient + 0.1 * tensor.detach()
            tensor.data -= lr * velocity[name]
    result = toy.fit(learner, source, settings)
    for name, tensor in learner.named_parameters():
        torch.testing.assert_close(tensor, expected[name])
    assert [epoch.loss for epoch in result.epochs] == pytest.approx([loss.item() for loss in losses])
    assert [epoch.lr for epoch in result.epochs] == pytest.approx(rates)


def test_progress_bar_counts_all_steps_and_can_be_silent(toy, capsys, monkeypatch):
    toy.fit(toy.learner(), toy.source(), toy.settings())
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    fit(toy.learner(), toy.source(), toy.settings(), progress=True)
    bar = capsys.readouterr().err
    assert "20/20" in bar and "epoch=4" in bar
    assert all(name in bar for name in ("loss=", "accuracy=", "lr="))


@pytest.mark.parametrize(("n", "sizes"), [(5, [5]), (8, [8]), (20, [8, 8])])
def test_batches_of_an_epoch(toy, n, sizes):
    source = toy.source(n=n)
    result = toy.fit(toy.learner(), source, toy.settings(epochs=2))
    asked = source.features.asked
    assert [len(batch) for batch in asked] == sizes * 2
    first, second = ([*chain(*batches)] for batches in (asked[: len(sizes)], asked[len(sizes) :]))
    assert len(set(first)) == len(first) == sum(sizes)  # no image twice
    assert first != second  # shuffled anew
    assert result.epochs[0].images_per_second == pytest.approx(sum(sizes) / result.epochs[0].seconds)


def test_seed_decides_and_callers_generator_is_left_alone(toy):
    def weights(seed, callers_seed):
        torch.manual_seed(callers_seed)
        state = torch.get_rng_state()
        learner = toy.learner()
        toy.fit(learner, toy.source(), toy.settings(seed=seed))
        assert torch.equal(torch.get_rng_state(), state)
        return learner.weight.detach()

    assert torch.equal(weights(1, 10), weights(1, 11))
    assert not torch.equal(weights(1, 10), weights(2, 10))


def test_random_numbers_of_the_loss_differ_from_step_to_step(toy):
    drawn, learner = [], toy.learner()
    plain = learner.loss
    learner.loss = lambda scores, labels, *_: drawn.append(torch.rand(2).tolist()) or plain(scores, labels)
    toy.fit(learner, toy.source(n=16), toy.settings(epochs=3))
    assert len({tuple(pair) for pair in drawn}) == 6


def test_transforms_get_a_generator_of_their_own(toy):
    source, seen = toy.source(n=16), []
    plain = source.batch
    source.batch = lambda indices, generator, reads: seen.append(int(generator.initial_seed())) or plain(indices)
    toy.fit(toy.learner(), source, toy.settings(epochs=2))
    assert len(set(seen)) == 4


def test_on_epoch_sees_every_epoch_and_training_mode_comes_back(toy):
    learner, seen, modes = toy.learner(), [], []
    plain = learner.loss
    learner.loss = lambda scores, labels, *_: modes.append(learner.training) or plain(scores, labels)

    def on_epoch(metrics):
        seen.append(metrics)
        learner.eval()

    result = toy.fit(learner, toy.source(), toy.settings(), on_epoch=on_epoch)
    assert tuple(seen) == result.epochs and [metrics.epoch for metrics in seen] == [1, 2, 3, 4]
    assert all(modes) and not learner.training


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_names_the_step(toy, tmp_path, value):
    learner, run, calls = toy.learner(), toy.run(tmp_path / "run"), []
    plain = learner.loss
    # 44 images make 5 steps of 8: call 8 is step 3 of epoch 2.
    learner.loss = lambda scores, labels, *_: (
        plain(scores, labels) * (value if calls.append(0) or len(calls) == 8 else 1)
    )
    sentence = rf"the loss became {value} in step 3 of epoch 2 at learning rate 0.5: .*run keeps the state before, and "
    with pytest.raises(InputError, match=sentence + "goes on with a smaller lr than 0.5"):
        toy.fit(learner, toy.source(), toy.settings(), run=run)
    state = run.load_state()
    assert state.epoch == 1 and state.learned["weight"].isfinite().all()


def test_tensors_that_are_not_finite_are_never_saved(toy, tmp_path):
    learner, run = toy.learner(), toy.run(tmp_path / "run")
    learner.bias.register_hook(lambda gradient: gradient * math.nan)
    learner.loss = lambda scores, labels, *_: (
        scores.logits.nan_to_num().square().mean() + learner.bias.nan_to_num().sum()
    )
    with pytest.raises(InputError, match=r"bias is not finite any more after the last step of epoch 1 .*: try a"):
        toy.fit(learner, toy.source(), toy.settings(), run=run)
    assert not run.path.exists()


def test_what_cannot_be_trained_is_refused(toy):
    with pytest.raises(InputError, match=r"labels of training images: expected 0 to 2, .*got 0 to 3"):
        toy.fit(toy.learner(classes=3), toy.source(classes=4), toy.settings())
    source = toy.source()
    source.labels = source.labels - 1
    with pytest.raises(InputError, match=r"expected 0 to 3, .*got -1 to 2"):
        toy.fit(toy.learner(), source, toy.settings())
    with pytest.raises(InputError, match="training images: expected at least one, got none"):
        toy.fit(toy.learner(), toy.source(n=0), toy.settings())
    with pytest.raises(InputError, match=r"weight must be float32 to be trained, not torch\.float16"):
        toy.fit(toy.learner().half(), toy.source(), toy.settings())
    nothing = toy.learner()
    del nothing.weight, nothing.bias
    with pytest.raises(InputError, match="toy has no parameters"):
        toy.fit(nothing, toy.source(), toy.settings())


def test_a_step_loads_what_the_learner_reads_alone(toy):
    source = toy.source()
    toy.fit(toy.learner(), source, toy.settings(epochs=2))
    assert source.features.named == [{"pooled"}] * 10

import math

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, SequentialLR

from fastprompt import CoOp, GalLoP, Recipe
from fastprompt.errors import InputError
from fastprompt.training import TrainingSettings, published_settings


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"lr": 0.0}, "lr must be a finite number above 0, not 0.0"),
        ({"lr": math.nan}, "lr must be a finite number above 0, not nan"),
        ({"momentum": 1.0}, "momentum must be from 0 to below 1, not 1.0"),
        ({"weight_decay": -1e-3}, "weight_decay must be a finite number, at least 0, not -0.001"),
        ({"epochs": 2, "warmup_epochs": 2}, "warmup_epochs must be from 0 to below the 2 epochs, not 2"),
        ({"optimizer": "Adam"}, "optimizer must be SGD or AdamW, not Adam"),
        ({"warmup_lr": 0.0}, "warmup_lr must be a finite number above 0, not 0.0"),
        ({"seed": -1}, "seed must be at least 0, not -1"),
    ],
)
def test_out_of_range_is_one_sentence(changes, sentence):
    with pytest.raises(InputError) as error:
        TrainingSettings(**changes)
    assert str(error.value) == sentence


@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_learning_rate_is_torchs_warmup_then_cosine(warmup):
    settings = TrainingSettings(epochs=12, warmup_epochs=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=settings.lr)
    cosine = CosineAnnealingLR(optimizer, T_max=settings.epochs)
    scheduler = cosine
    if warmup:
        constant = ConstantLR(optimizer, factor=settings.warmup_lr / settings.lr, total_iters=warmup)
        scheduler = SequentialLR(optimizer, [constant, cosine], milestones=[warmup])
    for epoch in range(settings.epochs):
        expected = optimizer.param_groups[0]["lr"]
        assert settings.learning_rate(epoch) == pytest.approx(expected, rel=1e-12)
        optimizer.step()
        scheduler.step()


def test_learning_rate_at_known_points():
    settings = TrainingSettings(epochs=4)
    root = math.sqrt(0.5)
    expected = [1e-5, 0.002, 0.001 * (1 + root), 0.001]
    assert [settings.learning_rate(epoch) for epoch in range(4)] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("images", "steps"), [(1, 1), (31, 1), (32, 1), (63, 1), (64, 2), (70, 2)])
def test_incomplete_batch_is_dropped_only_after_a_full_one(images, steps):
    assert TrainingSettings(batch_size=32).steps_per_epoch(images) == steps


def test_optimizers_are_made_by_name():
    parameters = [torch.nn.Parameter(torch.ones(1))]
    sgd = TrainingSettings().make_optimizer(parameters)
    assert type(sgd) is torch.optim.SGD
    assert [sgd.defaults[name] for name in ("lr", "momentum", "weight_decay", "nesterov")] == [0.002, 0.9, 5e-4, False]
    adamw = TrainingSettings(optimizer="AdamW", lr=0.1, momentum=0.8).make_optimizer(parameters)
    assert type(adamw) is torch.optim.AdamW
    assert [adamw.defaults[name] for name in ("lr", "betas", "weight_decay")] == [0.1, (0.8, 0.999), 5e-4]
    recipe = Recipe(source="test", epochs={1: 5}, optimizer="AdamW")
    assert published_settings(recipe, 4) == TrainingSettings(epochs=5, optimizer="AdamW")


def test_published_settings():
    coop = CoOp.recipes["default"]
    shots = (1, 2, 3, 4, 8, 16, 32, None)
    assert [published_settings(coop, number).epochs for number in shots] == [50, 100, 100, 100, 200, 200, 200, 200]
    assert published_settings(coop, 16) == TrainingSettings()
    assert published_settings(CoOp.recipes["imagenet"], 16) == TrainingSettings(epochs=50)
    gallop = published_settings(GalLoP.recipes["default"], 16)
    assert (gallop.epochs, gallop.lr, gallop.weight_decay, gallop.warmup_epochs) == (200, 0.002, 1e-2, 0)
    assert published_settings(GalLoP.recipes["eurosat"], 1).batch_size == 10

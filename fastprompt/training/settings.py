"""How a learner is trained: the numbers, their units, and the settings that the methods were published with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastprompt.errors import InputError

if TYPE_CHECKING:
    from fastprompt.learners import Recipe


@dataclass(frozen=True)
class TrainingSettings:
    """SGD with a cosine schedule. The defaults are those of CoOp (Zhou et al. 2022) for 8 or 16 shots.

    Learned tensors and the optimizer's buffers are float32, whatever the precision of the backbone: at these learning
    rates an update is smaller than a half-precision number can hold.

    Raises:
        InputError: A number is out of its range.
    """

    epochs: int = 200
    """Passes over the training images. CoOp: 50 for 1 shot, 100 for 2 and 4, 200 for 8 and 16; ImageNet always 50."""

    batch_size: int = 32
    """Images a step. An incomplete last batch is dropped, unless it is the only one (the rule of Dassl)."""

    lr: float = 0.002
    """Learning rate at the top of the cosine (CoOp and GalLoP: 0.002)."""

    momentum: float = 0.9
    """Momentum of SGD, without Nesterov (CoOp and GalLoP: 0.9)."""

    weight_decay: float = 5e-4
    """L2 penalty on all learned tensors, towards zero (CoOp: 5e-4, GalLoP: 1e-2)."""

    warmup_epochs: int = 1
    """Epochs at the constant rate warmup_lr before the cosine starts (CoOp: 1, GalLoP: 0)."""

    warmup_lr: float = 1e-5
    """Learning rate during the warm-up (CoOp: 1e-5)."""

    seed: int = 1
    """Seed of image order, random transforms and prompt dropout (CoOp was run with 1, 2 and 3, GalLoP with 1)."""

    def __post_init__(self) -> None:
        _require("epochs", self.epochs, self.epochs >= 1, "at least 1")
        _require("batch_size", self.batch_size, self.batch_size >= 1, "at least 1")
        _require("lr", self.lr, 0 < self.lr < math.inf, "a finite number above 0")
        _require("momentum", self.momentum, 0 <= self.momentum < 1, "from 0 to below 1")
        _require("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "a finite number, at least 0")
        in_range = 0 <= self.warmup_epochs < self.epochs
        _require("warmup_epochs", self.warmup_epochs, in_range, f"from 0 to below the {self.epochs} epochs")
        _require("warmup_lr", self.warmup_lr, 0 < self.warmup_lr < math.inf, "a finite number above 0")
        _require("seed", self.seed, self.seed >= 0, "at least 0")

    def learning_rate(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0: constant warm-up, then a cosine that starts from its own step 0.

        The cosine's period is the number of all epochs, warm-up included, as in Dassl and GalLoP; so the last epoch
        is near zero, not at it. A closed formula has no state, which makes a resumed run exact.
        """
        if epoch < self.warmup_epochs:
            return self.warmup_lr
        return self.lr * (1 + math.cos(math.pi * (epoch - self.warmup_epochs) / self.epochs)) / 2

    def steps_per_epoch(self, images: int) -> int:
        """Steps in an epoch over this many images: full batches only, or one smaller batch if there is no full one."""
        return max(images // self.batch_size, 1)


def published_settings(recipe: Recipe, shots: int | None = None) -> TrainingSettings:
    """The settings that a method was published with.

    Args:
        recipe: Of the method.
        shots: Training images a class; None for all images.
    """
    taken = ("batch_size", "lr", "momentum", "weight_decay", "warmup_epochs", "warmup_lr")
    return TrainingSettings(epochs=recipe.epochs_for(shots), **{name: getattr(recipe, name) for name in taken})


def _require(name: str, value: float, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} must be {expected}, not {value}")

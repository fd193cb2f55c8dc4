"""How a learner is trained: the numbers, their units, and the settings that the methods were published with."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from fastprompt.learners.recipe import Recipe
from fastprompt.learners.schedule import Schedule, require


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(Schedule):
    """How a learner is trained: a ``Schedule`` and a seed. The defaults are those of CoOp for 8 or 16 shots.

    Learned tensors and the optimizer's buffers are float32, whatever the precision of the backbone: at these learning
    rates an update is smaller than a half-precision number can hold.

    Attributes:
        epochs: passes over the training images. CoOp: 50 for 1 shot, 100 for 2 and 4, 200 for 8 and 16; ImageNet always
            50.
        seed: of image order, random transforms and the loss (CoOp was run with 1, 2 and 3, GalLoP with 1).

    Raises:
        InputError: a number is out of its range.
    """

    epochs: int = 200
    seed: int = 1

    def __post_init__(self) -> None:
        require("epochs", self.epochs, self.epochs >= 1, "at least 1")
        super().__post_init__()
        in_range = 0 <= self.warmup_epochs < self.epochs
        require("warmup_epochs", self.warmup_epochs, in_range, f"from 0 to below the {self.epochs} epochs")
        require("seed", self.seed, self.seed >= 0, "at least 0")

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
    numbers = {number.name: getattr(recipe, number.name) for number in fields(Schedule)}
    return TrainingSettings(**{**numbers, "epochs": recipe.epochs_for(shots)})

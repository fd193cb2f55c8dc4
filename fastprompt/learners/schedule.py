"""The numbers of a training that recipes publish and the training loop follows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from fastprompt.errors import InputError

OPTIMIZERS = ("SGD", "AdamW")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """An optimizer with a cosine over the epochs. The defaults are those of CoOp's code base, which most methods share.

    Attributes:
        epochs: passes over the training images.
        batch_size: images a step. An incomplete last batch is dropped, unless it is the only one (the rule of Dassl).
        lr: learning rate at the top of the cosine (CoOp and GalLoP: 0.002).
        weight_decay: of all learned tensors, towards zero (CoOp: 5e-4, GalLoP: 1e-2): as an L2 penalty by SGD, and
            decoupled from the gradient by AdamW.
        momentum: of SGD, without Nesterov (CoOp and GalLoP: 0.9); the first beta of AdamW, whose second is 0.999.
        warmup_epochs: epochs at the constant rate ``warmup_lr`` before the cosine starts (CoOp: 1, GalLoP: 0).
        warmup_lr: learning rate of these (CoOp: 1e-5).
        optimizer: SGD or AdamW.

    Raises:
        InputError: a number is out of its range, or another optimizer.
    """

    epochs: int | Mapping[int, int] = 50
    batch_size: int = 32
    lr: float = 0.002
    weight_decay: float = 5e-4
    momentum: float = 0.9
    warmup_epochs: int = 1
    warmup_lr: float = 1e-5
    optimizer: str = "SGD"

    def __post_init__(self) -> None:
        require("batch_size", self.batch_size, self.batch_size >= 1, "at least 1")
        require("lr", self.lr, 0 < self.lr < math.inf, "a finite number above 0")
        require("momentum", self.momentum, 0 <= self.momentum < 1, "from 0 to below 1")
        require("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "a finite number, at least 0")
        require("warmup_lr", self.warmup_lr, 0 < self.warmup_lr < math.inf, "a finite number above 0")
        require("optimizer", self.optimizer, self.optimizer in OPTIMIZERS, " or ".join(OPTIMIZERS))

    def make_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Make the optimizer of learned tensors, at the top of the cosine."""
        own = {"SGD": {"momentum": self.momentum}, "AdamW": {"betas": (self.momentum, 0.999)}}[self.optimizer]
        kind = getattr(torch.optim, self.optimizer)
        return kind(parameters, lr=self.lr, weight_decay=self.weight_decay, **own)


def require(name: str, value: object, holds: bool, expected: str) -> None:
    """Raise ``InputError`` unless what is expected of a setting holds."""
    if not holds:
        raise InputError(f"{name} must be {expected}, not {value}")

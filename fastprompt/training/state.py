"""The state of an unfinished training, as tensors and strings: nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import torch
from torch import Tensor

from fastprompt.errors import InputError
from fastprompt.files import write_tensors

if TYPE_CHECKING:
    from fastprompt.learners import Learner


@dataclass(frozen=True)
class TrainingState:
    """Everything that a resumed training needs to go on exactly as if it had not stopped.

    The learning rate and all random numbers follow from the settings, the epoch and the step, so they have no state.

    Attributes:
        class_names: The learner's, to notice that the classes changed.
        fingerprint: Of the learner's backbone, to notice that its weights changed.
        labels: (images,) int64, the source's, to notice that the data changed.
        origin: What else the bits of the features depend on, as the source tells it.
        epoch: Epochs that are done.
        step: Steps that are done in the epoch after those.
        seconds: Time spent on these steps.
        losses: (step,) float32, loss of each of these steps.
        correct: (step,) int64, images that each of these steps predicted right.
        learned: The learner's state_dict.
        momentum: SGD's momentum buffers by parameter name; empty before the first step.
    """

    class_names: tuple[str, ...]
    fingerprint: str
    labels: Tensor
    origin: str
    epoch: int
    step: int
    seconds: float
    losses: Tensor
    correct: Tensor
    learned: Mapping[str, Tensor]
    momentum: Mapping[str, Tensor]

    def write(self, file: Path) -> None:
        """Write the state as one safetensors file.

        Raises:
            InputError: The file cannot be written.
        """
        tensors = {"labels": self.labels, "losses": self.losses, "correct": self.correct}
        tensors |= {f"learned.{name}": tensor for name, tensor in self.learned.items()}
        tensors |= {f"momentum.{name}": tensor for name, tensor in self.momentum.items()}
        texts = ("class_names", "fingerprint", "origin", "epoch", "step", "seconds")
        said = {name: json.dumps(getattr(self, name)) for name in texts}
        write_tensors(file, tensors, said)

    @classmethod
    def from_file(cls, path: Path) -> TrainingState:
        """Read a state that `write` wrote.

        Raises:
            InputError: The file is damaged or holds something else.
        """
        tensors, metadata = read_tensors(path)
        try:
            return cls(
                class_names=tuple(json.loads(metadata["class_names"])),
                fingerprint=json.loads(metadata["fingerprint"]),
                labels=tensors["labels"],
                origin=json.loads(metadata["origin"]),
                epoch=int(metadata["epoch"]),
                step=int(metadata["step"]),
                seconds=float(metadata["seconds"]),
                losses=tensors["losses"],
                correct=tensors["correct"],
                learned=_below("learned.", tensors),
                momentum=_below("momentum.", tensors),
            )
        except (KeyError, ValueError) as error:
            raise InputError(f"{path} must hold the state of a training, but {error} is missing or invalid") from error

    def check_data(self, learner: Learner, labels: Tensor, file: Path) -> None:
        """Compare with the learner and the data of now.

        Args:
            learner: Its class names and the weights of its backbone must be those of before.
            labels: (images,) int64, the source's.
            file: Where this state comes from, for messages.

        Raises:
            InputError: There are other classes, weights or labels.
        """
        for index, (old, new) in enumerate(zip_longest(self.class_names, learner.class_names)):
            if old != new:
                raise InputError(f"{file} was made with {old!r} as class {index}, but now that is {new!r}")
        if self.fingerprint != (now := learner.backbone.fingerprint):
            raise InputError(
                f"{file} was made on weights with fingerprint {self.fingerprint}, but those now have {now}"
            )
        if len(self.labels) != len(labels):
            raise InputError(
                f"{file} was made with {len(self.labels)} training images, but now there are {len(labels)}"
            )
        if not torch.equal(self.labels, labels):
            raise InputError(
                f"{file} was made with other labels of its {len(labels)} training images than there are now"
            )


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, on the CPU, and its metadata.

    Raises:
        InputError: The file cannot be read as safetensors.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError(f"{path} must be a readable safetensors file: {error}") from error


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

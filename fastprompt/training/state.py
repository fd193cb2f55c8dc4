"""The state of an unfinished training, as tensors and strings: nothing is pickled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
from torch import Tensor

from fastprompt.errors import InputError
from fastprompt.files import write_tensors


@dataclass(frozen=True)
class TrainingState:
    """Everything that a resumed training needs to go on exactly as if it had not stopped.

    The learning rate and all random numbers follow from the settings, the epoch and the step, so they have no state.

    Attributes:
        images: Number of training images, to notice that the data changed.
        epoch: Epochs that are done.
        step: Steps that are done in the epoch after those.
        seconds: Time spent on these steps.
        losses: (step,) float32, loss of each of these steps.
        correct: (step,) int64, images that each of these steps predicted right.
        learned: The learner's state_dict.
        momentum: SGD's momentum buffers by parameter name; empty before the first step.
    """

    images: int
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
        tensors = {"losses": self.losses, "correct": self.correct}
        tensors |= {f"learned.{name}": tensor for name, tensor in self.learned.items()}
        tensors |= {f"momentum.{name}": tensor for name, tensor in self.momentum.items()}
        counters = {name: repr(getattr(self, name)) for name in ("images", "epoch", "step", "seconds")}
        write_tensors(file, tensors, counters)

    @classmethod
    def from_file(cls, path: Path) -> TrainingState:
        """Read a state that `write` wrote.

        Raises:
            InputError: The file is damaged or holds something else.
        """
        tensors, metadata = read_tensors(path)
        try:
            return cls(
                images=int(metadata["images"]),
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

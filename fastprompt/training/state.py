"""The state of an unfinished training, as tensors and strings: nothing is pickled."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastprompt.documents import build, check_object, parse_json
from fastprompt.errors import InputError
from fastprompt.files import read_tensors, write_tensors

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
        optimizer: The optimizer's tensors by kind and parameter, such as "momentum_buffer.context"; none at the start.
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
    optimizer: Mapping[str, Tensor]

    def write(self, file: Path) -> None:
        """Write the state as one safetensors file.

        Raises:
            InputError: The file cannot be written.
        """
        tensors = {"labels": self.labels, "losses": self.losses, "correct": self.correct}
        tensors |= {f"learned.{name}": tensor for name, tensor in self.learned.items()}
        tensors |= {f"optimizer.{name}": tensor for name, tensor in self.optimizer.items()}
        said = {field.name: json.dumps(getattr(self, field.name)) for field in fields(_Said)}
        write_tensors(file, tensors, said)

    @classmethod
    def from_file(cls, path: Path) -> TrainingState:
        """Read a state that `write` wrote.

        Raises:
            InputError: The file is damaged or holds something else.
        """
        where = f"training state {path}"
        tensors, metadata = read_tensors(path, "training state")
        said = build(_Said, {name: parse_json(text, f"{where}: {name}") for name, text in metadata.items()}, where)
        if not (said.epoch >= 0 and said.step >= 0 and 0 <= said.seconds < math.inf):
            raise InputError(
                f"{where}: expected numbers of at least 0, got epoch {said.epoch}, step {said.step}, "
                f"{said.seconds} seconds"
            )
        check_object(tensors, where, ["labels", "losses", "correct"])
        learned, optimizer = _below("learned.", tensors), _below("optimizer.", tensors)
        for name, tensor in optimizer.items():
            kind, _, parameter = name.partition(".")
            check_object(learned, f"{where}: learned tensors", [parameter])
            shape = () if kind == "step" else learned[parameter].shape
            _check(tensor, torch.float32, shape, f"{where}: {kind} of {parameter}")
        known = ("labels", "losses", "correct", "learned.", "optimizer.")
        if foreign := [name for name in tensors if not name.startswith(known)]:
            raise InputError(f"{where}: expected no tensor {foreign[0]!r}")
        _check(tensors["labels"], torch.int64, (tensors["labels"].numel(),), f"{where}: labels")
        for name, dtype in (("losses", torch.float32), ("correct", torch.int64)):
            _check(tensors[name], dtype, (said.step,), f"{where}: {name}")
        texts = {**asdict(said), "class_names": tuple(said.class_names)}
        numbers = {name: tensors[name] for name in ("labels", "losses", "correct")}
        return cls(**texts, **numbers, learned=learned, optimizer=optimizer)

    def optimizer_state(self, parameters: Sequence[str]) -> dict[int, dict[str, Tensor]]:
        """The optimizer's tensors as its ``state_dict`` has them: by the place of each parameter, and by kind."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self.optimizer.items():
            kind, _, parameter = name.partition(".")
            state.setdefault(parameters.index(parameter), {})[kind] = tensor
        return state

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


@dataclass(frozen=True)
class _Said:
    """What stands beside the tensors, with its types."""

    class_names: list[str]
    fingerprint: str
    origin: str
    epoch: int
    step: int
    seconds: float


def _check(tensor: Tensor, dtype: torch.dtype, shape: Sequence[int], where: str) -> None:
    """Raise ``InputError`` unless a tensor has this type and shape, and finite numbers."""
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape) or not tensor.isfinite().all():
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise InputError(f"{where}: expected finite numbers, {dtype} {tuple(shape)}, got {found}")


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

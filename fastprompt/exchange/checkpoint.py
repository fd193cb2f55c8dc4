"""Checkpoints of other code, read without executing anything: CoOp's family (written by Dassl) and GalLoP."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastprompt.documents import check_file
from fastprompt.errors import InputError
from fastprompt.learners import METHODS, Learner

ROWS = ("token_prefix", "token_suffix")  # of CoOp's family: (R, 1, W) and (R, L, W), embedded prompts around ctx


class _Inert:
    """Stands for an object that was stored beside the tensors; takes its state and does nothing."""

    def __new__(cls, *_arguments: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_arguments: object) -> None: ...

    def __setstate__(self, _state: object) -> None: ...


def _inert(*_arguments: object) -> _Inert:
    """Stands for a function that makes such an object."""
    return _Inert()


def _empty(_factory: object = None) -> dict:
    """Stands for a dictionary with a default."""
    return {}


# Dassl's warm-up scheduler holds the scheduler behind it, and that the optimizer: as objects, not as dictionaries.
# Best accuracies are often NumPy's numbers.
_BESIDE = [
    f"{kind.__module__}.{kind.__qualname__}"
    for module in (torch.optim, torch.optim.lr_scheduler)
    for kind in vars(module).values()
    if isinstance(kind, type)
]
_NUMPY = ("multiarray.scalar", "multiarray._reconstruct")
HARMLESS = [
    argparse.Namespace,
    dict,
    (_empty, "collections.defaultdict"),  # of an optimizer's state, which torch's reader would refuse to fill
    *((_Inert, name) for name in (*_BESIDE, "numpy.dtype", "numpy.ndarray")),
    *((_inert, f"numpy.{core}.{name}") for core in ("core", "_core") for name in _NUMPY),
]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint of other code says.

    Attributes:
        file: it was read from.
        learner: our class of its method.
        state: its tensors in float32, under their own names.
        arguments: of its training script; empty where it does not say.
    """

    file: Path
    learner: type[Learner]
    state: Mapping[str, Tensor]
    arguments: Mapping[str, Any]

    @property
    def learned(self) -> dict[str, Tensor]:
        """The learned tensors, under our names."""
        return {ours: self.state[theirs] for theirs, ours in self.learner.foreign_names.items() if ours is not None}

    @property
    def rows(self) -> Tensor | None:
        """The embedded names (R, L, W) behind each context of CoOp's family; None where they were not stored."""
        return self.state.get(ROWS[1])

    def options(self) -> dict[str, Any]:
        """Options of our learner, as far as tensors and arguments of the training tell."""
        try:
            return self.learner.read_foreign(self.state, self.arguments)
        except InputError as error:
            raise InputError(f"{self.file}: {error}") from error


def read_checkpoint(file: Path) -> Checkpoint:
    """Read a ``model.pth.tar-N`` of Dassl or a ``.ckpt`` of GalLoP; methods say themselves which of them are theirs.

    Raises:
        InputError: no such file, one that needs code to be executed, or one without the tensors of any method.
    """
    content = _read(file)
    stored = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(stored, dict):
        raise InputError(f"{file}: expected a checkpoint with a state_dict, got one where it has no state_dict")
    # Of torch's data parallelism, and of code that stores the whole model.
    stored = {
        str(name).removeprefix("module.").removeprefix("prompt_learner."): value for name, value in stored.items()
    }
    state = {name: value for name, value in stored.items() if _unreadable(value) is None}
    learner = max(METHODS.values(), key=lambda method: (method.recognises(state), -len(method.foreign_names)))
    if not learner.recognises(state):
        known = ", ".join(sorted(name for name, method in METHODS.items() if "foreign_names" in vars(method)))
        found = ", ".join(_shown(name, stored[name]) for name in sorted(stored)[:5]) or "nothing"
        raise InputError(f"{file}: expected the tensors of one of {known}, got {found}")
    needed = [name for name, ours in learner.foreign_names.items() if ours is not None]
    for name in (name for name in needed if name not in state):
        found = _shown(name, stored[name]) if name in stored else "none"
        raise InputError(f"{file}: expected the tensor {name} of {learner.method}, got {found}")
    rows = [name for name in ROWS if name in stored and "ctx" in learner.foreign_names]
    for name in (name for name in rows if name not in state or state[name].dim() != 3):
        raise InputError(f"{file}: expected {name} with 3 axes, got {_shown(name, stored[name])}")
    taken = {name: state[name].float() for name in (*needed, *rows)}
    checkpoint = Checkpoint(file, learner, taken, _arguments(file, content.get("args")))
    checkpoint.options()  # refuses what is not of its method's shape
    return checkpoint


def _read(file: Path) -> Any:
    check_file(file, "checkpoint")
    try:
        with torch.serialization.safe_globals(HARMLESS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # over a damaged file torch's reader stumbles in many ways
        # Of what it says, the name alone is passed on: the rest tells how to execute the file all the same.
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            needs = f"it needs {refused[1]}"
            raise InputError(f"{file} must be a checkpoint that is read without executing it, but {needs}") from error
        raise InputError(f"{file} must be a checkpoint, but it cannot be read ({type(error).__name__})") from error


def _unreadable(tensor: object) -> str | None:
    """Why something is not a plain array of finite floating-point numbers; None if it is one."""
    if not isinstance(tensor, Tensor):
        return f"a {type(tensor).__name__}"
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        return "sparse, nested, quantised or without values"
    if not tensor.is_floating_point():
        return f"of {tensor.dtype}"
    if not tensor.numel():
        return f"empty, of shape {tuple(tensor.shape)}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"expanded to shape {tuple(tensor.shape)} without the values for it"
    return None if tensor.float().isfinite().all() else "not finite: NaN or infinity is among its numbers"


def _shown(name: str, value: Any) -> str:
    """A tensor by its name and shape, or what it is instead."""
    return f"{name} ({_unreadable(value) or ' x '.join(map(str, value.shape))})"


def _arguments(file: Path, args: object) -> Mapping[str, Any]:
    """The arguments of a training script: a namespace as GalLoP stores it, or a dictionary."""
    found = {} if args is None else vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(found, dict):
        raise InputError(f"{file}: expected args as a namespace or a dictionary, got a {type(found).__name__}")
    return found

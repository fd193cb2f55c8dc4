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

# By method the tensors of its checkpoint, and how our learner calls them.
NAMES = {
    "gallop": {
        "global_prompt": "global_prompts",
        "local_prompts": "local_prompts",
        "local_proj.linear.weight": "local_projection",
    },
    "cocoop": {
        "ctx": "context",
        "meta_net.linear1.weight": "meta_net.linear1.weight",
        "meta_net.linear1.bias": "meta_net.linear1.bias",
        "meta_net.linear2.weight": "meta_net.linear2.weight",
        "meta_net.linear2.bias": "meta_net.linear2.bias",
    },
    "kgcoop": {"ctx": "context"},
    "coop": {"ctx": "context"},
}

# How many axes the tensors have; those of the meta-net 1 or 2.
AXES = {
    "ctx": (2, 3),
    "global_prompt": (3,),
    "local_prompts": (3,),
    "local_proj.linear.weight": (2,),
    "token_prefix": (3,),
    "token_suffix": (3,),
}


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
        method: name of our learner.
        learned: its tensors in float32, under our names.
        start_of_text: (W,) embedding of the start-of-text token of its backbone; None in GalLoP's.
        suffix: (R, L, W) what follows the context in each of R prompts: embedded names; None in GalLoP's.
        arguments: of GalLoP's training script; empty for the others.
    """

    file: Path
    method: str
    learned: Mapping[str, Tensor]
    start_of_text: Tensor | None
    suffix: Tensor | None
    arguments: Mapping[str, Any]


def read_checkpoint(file: Path) -> Checkpoint:
    """Read a ``model.pth.tar-N`` of CoOp, CoCoOp, KgCoOp, ProGrad or PLOT, or a ``.ckpt`` of GalLoP.

    Raises:
        InputError: no such file, one that needs code to be executed, or one without the tensors of these methods.
    """
    content = _read(file)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise InputError(f"{file} must be a checkpoint of CoOp, CoCoOp, KgCoOp or GalLoP, but it has no state_dict")
    # Of torch's data parallelism, and of code that stores the whole model.
    state = {str(name).removeprefix("module.").removeprefix("prompt_learner."): value for name, value in state.items()}
    method = _method(file, state)
    if missing := NAMES[method].keys() - state.keys():
        raise InputError(f"{file} is a checkpoint of {method} without the tensor {', '.join(sorted(missing))}")
    learned = {ours: _tensor(file, state, theirs).float() for theirs, ours in NAMES[method].items()}
    start = _tensor(file, state, "token_prefix")[0, 0].float() if "token_prefix" in state else None
    suffix = _tensor(file, state, "token_suffix").float() if "token_suffix" in state and method != "gallop" else None
    return Checkpoint(file, method, learned, start, suffix, _arguments(file, content.get("args")))


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


def _tensor(file: Path, state: Mapping[str, Any], name: str) -> Tensor:
    """A tensor of a state_dict, with as many axes as the published code gives it."""
    axes, value = AXES.get(name, (1, 2)), state[name]
    found = f"a {type(value).__name__}" if not isinstance(value, Tensor) else _unreadable(value)
    if found is None and value.dim() not in axes:
        found = f"of shape {tuple(value.shape)}"
    if found is not None:
        raise InputError(
            f"{file} must hold {name} as a tensor with {' or '.join(map(str, axes))} axes, but it is {found}"
        )
    return value


def _unreadable(tensor: Tensor) -> str | None:
    """Why a tensor is not a plain array of finite floating-point numbers; None if it is one."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        return "sparse, nested, quantised or without values"
    if not tensor.is_floating_point():
        return f"of {tensor.dtype}"
    if not tensor.numel():
        return f"empty, of shape {tuple(tensor.shape)}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"expanded to shape {tuple(tensor.shape)} without the values for it"
    return None if tensor.float().isfinite().all() else "not finite: NaN or infinity is among its numbers"


def _arguments(file: Path, args: object) -> Mapping[str, Any]:
    """The arguments of a training script: a namespace as GalLoP stores it, or a dictionary."""
    found = {} if args is None else vars(args) if isinstance(args, argparse.Namespace) else args
    if not isinstance(found, dict):
        raise InputError(f"{file} must hold args as a namespace or a dictionary, but they are a {type(found).__name__}")
    return found


def _method(file: Path, state: Mapping[str, Tensor]) -> str:
    """The method that a state_dict belongs to."""
    if "global_prompt" in state or "local_prompts" in state:
        return "gallop"
    if "ctx" not in state:
        found = ", ".join(sorted(state)[:5]) or "nothing"
        raise InputError(f"{file} must hold ctx (CoOp, CoCoOp, KgCoOp) or global_prompt (GalLoP), but it holds {found}")
    if "bias_vectors" in state:  # unused by KgCoOp, and in no other
        return "kgcoop"
    return "cocoop" if any(name.startswith("meta_net.") for name in state) else "coop"

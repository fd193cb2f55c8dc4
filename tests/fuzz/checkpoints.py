"""Checkpoints of other code: some harmless, which must be read, some with a payload, which must not be executed."""

import argparse
import builtins
import collections
import functools
import importlib
import io
import os
import pickle
import pickletools
import runpy
import shutil
import subprocess
from pathlib import Path
from random import Random

import numpy as np
import torch

from tests.fuzz.mutate import TENSORS, spoil_bytes, spoil_state
from tests.fuzz.world import WIDTH, coop_state, gallop_state

TOUCH = "touch canary"


class Payload:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


# Whoever executes one of these leaves a file "canary", in a folder with the traps below.
TRACED = (
    lambda: Payload(os.system, TOUCH),
    lambda: Payload(eval, "__import__('os').system('touch canary')"),
    lambda: Payload(exec, "open('canary', 'w')"),
    lambda: Payload(open, "canary", "w"),
    lambda: Payload(subprocess.Popen, ["touch", "canary"]),
    lambda: Payload(subprocess.check_output, ["touch", "canary"]),
    lambda: Payload(shutil.copyfile, "canary.py", "canary"),
    lambda: Payload(Path.touch, Path("canary")),
    lambda: Payload(runpy.run_path, "canary.py"),
    lambda: Payload(torch.hub._load_local, ".", "canary"),
    lambda: Payload(list, Payload(map, os.system, [TOUCH])),
    lambda: Payload(functools.reduce, os.link, ["canary.py", "canary"]),
    lambda: Payload(io.FileIO, "canary", "w"),
    lambda: Payload(np.load, "canary.npy", None, True),
)
PAYLOADS = (
    *TRACED,
    lambda: Payload(builtins.getattr, Payload(importlib.import_module, "os"), "system"),
    lambda: Payload(torch.load, "coop.pth.tar"),
    lambda: Payload(functools.partial, os.system, TOUCH),
    lambda: Payload(collections.defaultdict, os.getcwd),
    lambda: Payload(np.fromfile, "names.txt"),
)


def set_traps(folder: Path) -> None:
    """Write the files that some payloads would read and execute."""
    for name in ("canary.py", "hubconf.py"):
        (folder / name).write_text("open('canary', 'w')\n")
    np.save(folder / "canary.npy", np.array([Payload(os.system, TOUCH)], object))


def payload(rng: Random, file: Path) -> None:
    """A checkpoint with a call in one of many places, in one of torch's formats or as a plain pickle."""
    set_traps(file.parent)
    made = rng.choice(PAYLOADS)()
    content = {"state_dict": coop_state(), "epoch": 10}
    place = rng.choice(["beside", "state", "tensor", "args", "whole", "key", "optimizer"])
    if place == "whole":
        content = made
    elif place in ("state", "tensor"):
        content["state_dict"]["ctx" if place == "tensor" else "other"] = made
    elif place == "key":
        content = [content, made]
    else:
        content["epoch" if place == "beside" else place] = made
    how = rng.choice(["zip", "zip", "old", "plain", "protocol 0"])
    if how == "plain":
        file.write_bytes(pickle.dumps(content))
    elif how == "protocol 0":
        file.write_bytes(pickletools.optimize(pickle.dumps(made, protocol=0)))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "zip")


def harmless(rng: Random, file: Path) -> None:
    """A checkpoint as published code writes it, with what stands beside the tensors."""
    state = coop_state()
    optimizer = rng.choice(
        [
            torch.optim.SGD,
            torch.optim.Adam,
            torch.optim.AdamW,
            torch.optim.RMSprop,
            torch.optim.RAdam,
            torch.optim.NAdam,
        ]
    )([torch.nn.Parameter(state["ctx"].clone())], lr=0.1)
    schedules = torch.optim.lr_scheduler
    schedule = rng.choice(
        [
            lambda: schedules.CosineAnnealingLR(optimizer, 10),
            lambda: schedules.MultiStepLR(optimizer, [2, 3]),
            lambda: schedules.ExponentialLR(optimizer, 0.9),
            lambda: schedules.OneCycleLR(optimizer, 0.1, 10),
            lambda: schedules.ReduceLROnPlateau(optimizer),
        ]
    )()
    beside = {
        "epoch": rng.choice([10, np.int64(10)]),
        "best": rng.choice([0.5, np.float64(0.5), np.float32(0.5), np.array([0.5, 1.0]), None]),
        "optimizer": rng.choice([optimizer.state_dict(), None]),
        "scheduler": rng.choice([schedule.state_dict(), {"successor": schedule}, None]),
        "args": rng.choice([None, argparse.Namespace(seed=1, root="/data"), {"lr": 0.1}]),
    }
    prefix = rng.choice(["", "module.", "prompt_learner.", "module.prompt_learner."])
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16, torch.float64])
    state = {f"{prefix}{name}": tensor.to(dtype) for name, tensor in state.items()}
    if rng.random() < 0.3:
        state = {name: torch.nn.Parameter(tensor) for name, tensor in state.items()}
    torch.save({"state_dict": state, **beside}, file, _use_new_zipfile_serialization=rng.random() < 0.8)


def _expanded(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(1).expand(10**11, WIDTH) if tensor.dim() == 2 else torch.zeros(1).expand(4, 10**10, WIDTH)


FOREIGN = {
    **TENSORS,
    "sparse": lambda tensor: tensor.to_sparse(),
    "compressed": lambda tensor: tensor.reshape(-1, tensor.shape[-1]).to_sparse_csr(),
    "quantised": lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    "meta": lambda tensor: tensor.to("meta"),
    "expanded": _expanded,
    "a number": lambda tensor: 3.5,
    "a list": lambda tensor: tensor.tolist(),
    "nothing": lambda tensor: None,
    "a string": lambda tensor: "x" * 10**6,
    "an array": lambda tensor: tensor.numpy(),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor, tensor]),
}
ARGUMENTS = [
    *({"topk": value} for value in (None, "x", [], [0], [-1], [10**30], ["x"], [1.5], [True, 2], {"a": 1}, 3)),
    *({"global_dropout_p": value} for value in (None, "x", -1, 2, float("nan"), [0.5], True)),
    *({"clip_name": value} for value in (None, 3, "clip_vit_b32", ["x"], "\ud800")),
    *("x", 3, [1], None, {1: 2}),
]


def malformed(rng: Random, file: Path) -> None:
    """A checkpoint whose tensors, arguments or bytes are wrong."""
    gallop = rng.random() < 0.5
    state = gallop_state() if gallop else coop_state()
    content = {"state_dict": state, "epoch": 10, "args": argparse.Namespace(topk=[1, 2], global_dropout_p=0.5)}
    how = rng.choice(["tensor", "tensor", "tensor", "state", "args", "top", "bytes", "bytes", "script"])
    if how == "tensor":
        name = rng.choice(sorted(state))
        state[name] = rng.choice(list(FOREIGN.values()))(state[name])
    elif how == "state":
        content["state_dict"] = rng.choice([spoil_state(rng, state), list(state), None, 3, {}, {"ctx": {}}, {1: 2}])
    elif how == "args":
        given = rng.choice(ARGUMENTS)
        content["args"] = argparse.Namespace(**given) if isinstance(given, dict) and "topk" in given else given
    elif how == "top":
        content = rng.choice([state, list(state.values()), None, 3, "x", {"model": state}, torch.zeros(3)])
    if how == "script":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
        return
    torch.save(content, file, _use_new_zipfile_serialization=rng.random() < 0.8)
    if how == "bytes":
        file.write_bytes(spoil_bytes(rng, file.read_bytes()))

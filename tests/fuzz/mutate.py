"""Ways to spoil what a file holds: JSON, tensors, bytes, and the file itself."""

import json
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load, save

DEEP: list = []
for _ in range(60):
    DEEP = [DEEP]
ODD = [
    *(None, True, False, -1, 0, 1, 2, 2**63, 10**30, 1.5, -0.5, float("nan"), float("inf"), 1e308, 5e-324),
    *("", " ", "x", "1", "\x00", "\ud800", "\x1b[2J", "~nouser/x", "../..", "{}", "{", "a" * 100_000, "猫", "\u202e"),
    *([], {}, [[]], [1], [-1], ["x"], [None], [0.5, "x"], {"a": 1}, {"": {}}, DEEP, list(range(2000))),
]
FLOAT8 = torch.float8_e4m3fn


def places(document: Any) -> list[tuple[Any, Any]]:
    """Every container of a JSON document with each of its keys."""
    found, pending = [], [document]
    while pending:
        node = pending.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            found.append((node, key))
            pending.append(node[key])
    return found


def spoil_json(rng: Random, document: Any) -> bytes:
    """JSON with one thing wrong, of its values or of its text."""
    document = json.loads(json.dumps(document))
    found = places(document)
    if found and rng.random() < 0.7:
        container, key = rng.choice(found)
        how = rng.choice(["replace"] * 6 + ["remove", "rename", "add", "text", "list"])
        if how == "replace":
            container[key] = rng.choice(ODD)
        elif how == "text":
            container[key] = str(container[key])
        elif how == "list":
            container[key] = [container[key]]
        elif isinstance(container, list):
            container.pop(key) if how == "remove" else container.append(rng.choice(ODD))
        elif how == "add":
            container["surprise"] = rng.choice(ODD)
        else:
            value = container.pop(key)
            if how == "rename":
                container[f"{key}x"] = value
        return json.dumps(document).encode()
    text = json.dumps(document)
    return rng.choice(
        [
            *(b"", b"{", b"null", b"[]", b"{}", b"3", b'"x"', b"NaN", b"\xff\xfe\x00", b"\x00" * 100),
            *(b"[" * 100_000, b'{"a":' * 100_000, b"[" * 900 + b"]" * 900, b"1" * 6000),
            *(json.dumps(odd).encode() for odd in rng.sample(ODD, 3)),
            text[: rng.randrange(len(text) + 1)].encode(),
            text.replace("{", '{"method": 1, "method": 2, ', 1).encode(),
            text.encode("utf-16"),
            text.encode("utf-8-sig"),
            text.encode("utf-16")[2:],
            text.replace("e", "\xe9").encode("latin-1", "replace"),
            f"{text},".encode(),
            f"{text}{text}".encode(),
            text.replace('"', "'").encode(),
        ]
    )


def spoil_bytes(rng: Random, content: bytes) -> bytes:
    """Bytes that were cut, flipped, or are something else."""
    how = rng.choice(["cut", "flip", "noise", "zeros", "empty", "append", "start"])
    at = rng.randrange(len(content) + 1)
    if how == "cut" or not content:
        return content[:at]
    if how == "flip":
        spoiled = bytearray(content)
        for _ in range(rng.choice([1, 20])):
            place = rng.randrange(min(len(content), rng.choice([100, 1000, len(content)])))
            spoiled[place] ^= 1 << rng.randrange(8)
        return bytes(spoiled)
    if how == "append":
        return content + rng.randbytes(50)
    if how == "start":
        return rng.randbytes(8) + content[8:]
    return {"noise": rng.randbytes(rng.randrange(2000)), "zeros": bytes(len(content)), "empty": b""}[how]


def spoil_tensors(rng: Random, content: bytes) -> bytes:
    """A safetensors file with something wrong in its bytes, its header, its metadata or its tensors."""
    how = rng.choice(["bytes", "header", "length", "metadata", "metadata", "tensors", "tensors", "tensors"])
    if how == "bytes":
        return spoil_bytes(rng, content)
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if how == "length":
        return struct.pack("<Q", rng.choice([0, 1, length - 1, length + 1, 10**6, 2**63, 2**64 - 1])) + content[8:]
    if how == "tensors":
        return save(spoil_state(rng, load(content)), header.get("__metadata__"))
    if how == "metadata":
        metadata = header.get("__metadata__", {"x": "1"})
        name = rng.choice(sorted(metadata))
        try:
            metadata[name] = spoil_json(rng, json.loads(metadata[name])).decode("utf-8", "replace")
        except ValueError:
            metadata[name] = str(rng.choice(ODD))
        if rng.random() < 0.2:
            del metadata[name]
        spoiled = json.dumps({**header, "__metadata__": metadata}).encode()
    else:
        spoiled = spoil_json(rng, header)
    return struct.pack("<Q", len(spoiled)) + spoiled + data


def spoil_state(rng: Random, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Named tensors of which one has other values, another type, another shape or another name."""
    name = rng.choice(sorted(tensors))
    spoiled = {**tensors, name: rng.choice(list(TENSORS.values()))(tensors[name].clone())}
    how = rng.random()
    if how < 0.1:
        del spoiled[name]
    elif how < 0.2:
        spoiled["surprise"] = spoiled.pop(name)
    return spoiled


def _filled(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def fill(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.numel():
            tensor.view(-1)[-1] = value
        return tensor

    return fill


TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "nan": _filled(float("nan")),
    "infinity": _filled(float("inf")),
    "huge": _filled(3e38),
    "whole numbers": lambda tensor: tensor.long(),
    "truth values": lambda tensor: tensor > 0,
    "complex": lambda tensor: tensor.to(torch.complex64),
    "half": lambda tensor: tensor.half(),
    "double": lambda tensor: tensor.double(),
    "float8": lambda tensor: tensor.to(FLOAT8),
    "no axes": lambda tensor: tensor.new_tensor(1),
    "one axis": lambda tensor: tensor.reshape(-1),
    "one axis more": lambda tensor: tensor[None].contiguous(),
    "none of it": lambda tensor: tensor[:0] if tensor.dim() else tensor,
    "twice": lambda tensor: torch.cat([tensor, tensor]) if tensor.dim() else tensor,
    "transposed": lambda tensor: tensor.mT.contiguous() if tensor.dim() > 1 else tensor,
}


def spoil_file(rng: Random, file: Path) -> None:
    """Put something that is no regular file, or nothing, in the place of a file."""
    file.unlink()
    how = rng.choice(["fifo", "fifo", "fifo", "folder", "nothing", "dangling", "loop", "socket", "device", "empty"])
    if how == "fifo":
        os.mkfifo(file)
    elif how == "folder":
        file.mkdir()
    elif how == "dangling":
        file.symlink_to("nowhere")
    elif how == "loop":
        file.symlink_to(file.name)
    elif how == "device":
        file.symlink_to(rng.choice(["/dev/zero", "/dev/full", "/dev/null"]))
    elif how == "socket":
        here = Path.cwd()
        os.chdir(file.parent)  # addresses of sockets are short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(file.name)
        os.chdir(here)
    elif how == "empty":
        file.write_bytes(b"")

"""Malformed files: each function spoils one kind of file in the small world and says which command reads it."""

import json
import struct
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image
from safetensors.torch import load, save

from fastprompt.learners import METHODS
from fastprompt.learners.recipe import write_recipe
from tests.fuzz import checkpoints
from tests.fuzz.case import BRING_IN, DESCRIBED, FRESH, RESUME, SPLIT, USES, Case
from tests.fuzz.mutate import TENSORS, spoil_bytes, spoil_file, spoil_json, spoil_tensors
from tests.fuzz.world import COOP, IMPORT, PHOTO, TRAIN


def recipe(rng: Random, home: Path) -> Case:
    learner = METHODS[rng.choice(["coop", "gallop", "kgcoop", "plot", "zero-shot", "prograd"])]
    write_recipe(learner, learner.recipes["default"], home / "recipe.json")
    _spoil(rng, home / "recipe.json")
    few = ["--epochs", "1", "--batch-size", "4"] if learner.learns else []
    shots = ["--shots", "2"] if learner.learns else []
    train = ["train", learner.method, *TRAIN[:3], *shots, *few, "--recipe", "recipe.json", "--out", "out"]
    return Case(rng.choice([train, train, train, ["recipes", "show", learner.method, "recipe.json"]]))


def run_config(rng: Random, home: Path) -> Case:
    _spoil(rng, home / "run" / "config.json")
    return rng.choice(USES)


def run_environment(rng: Random, home: Path) -> Case:
    _spoil(rng, home / "run" / "environment.json")
    return rng.choice(USES)


def run_metrics(rng: Random, home: Path) -> Case:
    run = rng.choice(["run", "unfinished"])
    file = home / run / "metrics.jsonl"
    lines = file.read_bytes().splitlines()
    place = rng.randrange(len(lines))
    lines[place] = spoil_json(rng, json.loads(lines[place]))
    file.write_bytes(b"\n".join(lines) + b"\n")
    return RESUME if run == "unfinished" else rng.choice([USES[0], USES[-1], USES[-1]])


def run_model(rng: Random, home: Path) -> Case:
    file = home / "run" / "model.safetensors"
    file.write_bytes(spoil_tensors(rng, file.read_bytes()))
    return rng.choice(USES)


def run_model_not_finite(rng: Random, home: Path) -> Case:
    file = home / "run" / "model.safetensors"
    file.write_bytes(_not_finite(rng, file.read_bytes()))
    case = rng.choice(USES[:-1])
    return Case(case.arguments, "refusal")


def run_state(rng: Random, home: Path) -> Case:
    file = home / "unfinished" / "training_state.safetensors"
    file.write_bytes(spoil_tensors(rng, file.read_bytes()))
    return RESUME


def checkpoint(rng: Random, home: Path) -> Case:
    checkpoints.malformed(rng, home / "foreign.pth")
    return Case([*IMPORT, "foreign.pth"])


def checkpoint_payload(rng: Random, home: Path) -> Case:
    checkpoints.payload(rng, home / "foreign.pth")
    return Case([*IMPORT, "foreign.pth"], "refusal")


def checkpoint_harmless(rng: Random, home: Path) -> Case:
    checkpoints.harmless(rng, home / "foreign.pth")
    return Case([*IMPORT, "foreign.pth"], "success")


def backbone(rng: Random, home: Path) -> Case:
    weights = home / "model" / "open_clip_model.safetensors"
    how = rng.choice(["config", "config", "weights", "weights", "nan", "none"])
    if how == "config":
        _spoil(rng, home / "model" / "open_clip_config.json")
    elif how == "weights":
        weights.write_bytes(spoil_tensors(rng, weights.read_bytes()))
    elif how == "nan":
        weights.write_bytes(_not_finite(rng, weights.read_bytes()))
    else:
        weights.unlink()
    train, imported = FRESH, BRING_IN
    case = rng.choice([train, imported, *USES[:5]])
    return Case(case.arguments, "refusal" if how in ("nan", "none") else "either", case.may_change)


def cache(rng: Random, home: Path) -> Case:
    file = rng.choice(sorted((home / "cache").rglob("*.safetensors")))
    how = rng.random()
    if how < 0.2:
        spoil_file(rng, file)
    else:
        file.write_bytes((spoil_bytes if how < 0.6 else spoil_tensors)(rng, file.read_bytes()))
    return rng.choice([USES[0], replace(FRESH, may_stay=FRESH.may_change)])  # test images are read after training


def class_names_file(rng: Random, home: Path) -> Case:
    odd = ["", "\n\n\n", "a" * 10**6, "a\r\nb\r\nc\r\n", "red\nred\nred\n", "  a  \n b\nc", "_\n_\n_\n", "a\nb\n"]
    marks = ["x\x00y", "\x1b[2J", "Müsli", "猫", "\u200b", "a\u2028b", "\U0001f600", "$x", "\u202egnp", "{}"]
    text = rng.choice([*odd, *(f"{mark}\nb\nc\n" for mark in marks)])
    contents = [text.encode(one) for one in ("utf-8", "utf-8", "utf-8", "utf-16", "utf-8-sig")]
    contents += [text.encode("latin-1", "replace"), rng.randbytes(300), spoil_bytes(rng, text.encode())]
    (home / "names.txt").write_bytes(rng.choice(contents))
    return BRING_IN


def split_file(rng: Random, home: Path) -> Case:
    _spoil(rng, home / "split.json")
    if rng.random() < 0.5:
        return SPLIT
    (home / "split.json").rename(home / "photos" / "split_zhou_photos.json")
    return Case(["evaluate", "run", "photos"])


def descriptions(rng: Random, home: Path) -> Case:
    _spoil(rng, home / "descriptions.json")
    return DESCRIBED


def no_regular_file(rng: Random, home: Path) -> Case:
    uses = {
        "run/config.json": USES,
        "run/environment.json": USES,
        "run/metrics.jsonl": USES[-1:],
        "run/model.safetensors": USES,
        "unfinished/training_state.safetensors": [RESUME],
        "model/open_clip_config.json": USES[:5],
        "model/open_clip_model.safetensors": USES[:5],
        "names.txt": [BRING_IN],
        "coop.pth.tar": [BRING_IN],
        "split.json": [SPLIT],
        "descriptions.json": [DESCRIBED],
        PHOTO: [*USES[:3]],
        "photos/train/red/0.png": [FRESH],
    }
    name = rng.choice(sorted(uses))
    spoil_file(rng, home / name)
    return rng.choice(uses[name])


def images(rng: Random, home: Path) -> Case:
    file = home / rng.choice([PHOTO, "photos/train/red/0.png"])
    _write_image(rng, file)
    train = FRESH
    augmented = Case([*COOP, "--augment", "--out", "out"], may_change=["out"])
    return rng.choice([train, augmented] if "train" in file.parts else USES[:3])


def _write_image(rng: Random, file: Path) -> None:
    kind = rng.choice(["bytes", "bytes", "bytes", "long", "postscript", "noise", "text", "mode"])
    size = rng.choice([(1, 50_000), (50_000, 1), (1, 1), (3, 2000)]) if kind == "long" else (24, 20)
    picture = Image.fromarray(np.full((*size, 3), 77, np.uint8))
    if kind == "mode":
        picture = picture.convert(rng.choice(["1", "L", "LA", "P", "RGBA", "I;16" if rng.random() < 0.5 else "I"]))
    if kind in ("postscript", "text", "noise"):
        head = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
        file.write_bytes({"postscript": head, "text": b"hello", "noise": rng.randbytes(999)}[kind])
        return
    suffix = rng.choice(
        ["PNG", "PNG", "TIFF"] if kind == "mode" else ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"]
    )
    picture.save(file, "PNG" if max(size) > 16_000 else "TIFF" if picture.mode == "I" else suffix)
    if kind == "bytes":
        file.write_bytes(spoil_bytes(rng, file.read_bytes()))


def _spoil(rng: Random, file: Path) -> None:
    file.write_bytes(spoil_json(rng, json.loads(file.read_text())))


def _not_finite(rng: Random, content: bytes) -> bytes:
    """A safetensors file with a number in it that is none."""
    (length,) = struct.unpack("<Q", content[:8])
    tensors = load(content)
    name = rng.choice([name for name, tensor in sorted(tensors.items()) if tensor.is_floating_point()])
    tensors[name] = TENSORS[rng.choice(["nan", "infinity"])](tensors[name].clone())
    return save(tensors, json.loads(content[8 : 8 + length]).get("__metadata__"))

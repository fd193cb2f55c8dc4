"""Malformed arguments and names, and places that cannot be written."""

import os
from dataclasses import replace
from pathlib import Path
from random import Random

from tests.fuzz.case import ALL, BRING_IN, FRESH, USES, Case
from tests.fuzz.world import COOP, IMPORT, PHOTO, TRAIN

NAMES = [
    *("", " ", "\udcff", r"$\frac$", "$x", "{}", "{0}", "%s", "\x1b[2J", "猫", "\U0001f600", "\u202egnp", "a\nb"),
    *("_", "-", "[", "*", "\\", "^", "<b>", "&amp;", "'\"", "nan", "--seed", "red", "Red", "red ", "dark blue"),
    "\u200b",
]
NUMBERS = [
    *("-1", "0", "1", "1e3", "1.5", "nan", "inf", "-inf", "x", "", "0x10", "1_000", "１", "1e999", "-0.0", "5e-324"),
    *(str(10**11), str(2**63), str(2**64), str(10**30), "9" * 5000),
]
OPTIONS = {
    "coop": ["--seed", "--shots", "--batch-size", "--lr", "--weight-decay", "--image-batch", "--image-memory"],
    "gallop": ["--k", "--global-prompts", "--dropout", "--context", "--seed"],
    "plot": ["--prompts", "--context", "--eps", "--iterations", "--tolerance"],
    "locoop": ["--top-share", "--weight", "--memory-budget"],
    "cocoop": ["--context", "--memory-budget"],
}
DEVICES = [
    *("meta", "mps", "cuda:9", "nonsense", "", "cuda:-1", "cpu:7", "xpu", "vulkan", "hip", "ipu", "\x1b[2J"),
    "x" * 10**5,
]
PATHS = [
    *("~nouser", "~nouser/x", "", ".", "/dev/null", "/dev/zero", "/proc/self/mem", "a" * 300, "a/" * 3000, "\udcff"),
    *("\x1b[2J", "nowhere", "names.txt", "names.txt/x", "run", "photos", "http://x", "-", "$HOME", "a\nb"),
]
WORDS = [
    *("train", "coop", "predict", "run", "--seed", "--out", "x", "--", "--help", "--k", "\udcff", "", "recipes", "-"),
    *("--=", "=", "import", "--version"),
]


def class_names_given(rng: Random, home: Path) -> Case:
    names = [rng.choice([*NAMES, "a" * 10**5]) for _ in range(rng.randint(1, 3))]
    case = rng.choice([USES[1], USES[4], USES[2]])
    option = ["--class-name", names[0]] if case is USES[2] else ["--class-names", *names]
    return Case([*case.arguments, *option], may_change=case.may_change, encoding=_encoding(rng))


def numbers(rng: Random, home: Path) -> Case:
    value = rng.choice(NUMBERS)
    if rng.random() < 0.2:
        command = rng.choice([["words", "run", "--top"], ["predict", "run", PHOTO, "--top"]])
        return Case([*command, value])
    if rng.random() < 0.1:
        return Case(["evaluate", "run", "--image-batch", value])
    method = rng.choice(sorted(OPTIONS))
    views = ["--augment"] if rng.random() < 0.2 else []
    return Case(["train", method, *TRAIN, *views, rng.choice(OPTIONS[method]), value, "--out", "out"])


def device(rng: Random, home: Path) -> Case:
    case = rng.choice([*USES[:5], FRESH, BRING_IN])
    return Case([*case.arguments, "--device", rng.choice(DEVICES)], "refusal")


def paths(rng: Random, home: Path) -> Case:
    path = rng.choice(PATHS)
    commands = [
        ["train", "coop", path, *TRAIN[1:], "--out", "out"],
        ["train", "coop", "photos", "--backbone", f"local-dir:{path}", "--out", "out"],
        ["train", "coop", "photos", "--backbone", "ViT-B-32", "--pretrained", path, "--out", "out"],
        [*COOP, "--split-file", path, "--out", "out"],
        [*COOP, "--cache-dir", path if path.startswith(("~", "names", "/dev", "/proc")) else "cache/x", "--out", "out"],
        [*COOP, "--recipe", f"{path}.json", "--out", "out"],
        ["train", "dualpt", *TRAIN, "--descriptions", path, "--out", "out"],
        ["evaluate", path],
        ["evaluate", "run", path],
        ["evaluate", "run", "--ood", path],
        ["predict", path, PHOTO],
        ["predict", "run", path],
        ["explain", "run", path, "--out", "out.png"],
        [*IMPORT, path],
        [*IMPORT[:3], "--data", path, "--out", "out", "coop.pth.tar"],
        [*IMPORT[:3], "--class-names", path, "--out", "out", "coop.pth.tar"],
        ["export", path],
        ["recipes", "show", "coop", f"{path}.json"],
        ["recipes", "copy", "coop", "default", path],
    ]
    return Case(rng.choice(commands), may_change=("out", "out.png", "run/explained"))


def outputs(rng: Random, home: Path) -> Case:
    path = rng.choice([path for path in PATHS if not path.startswith("/")])
    commands = [
        [*COOP, "--out", path],
        [*IMPORT[:5], "--out", path, "coop.pth.tar"],
        ["export", "run", "--out", f"{path}.safetensors"],
        ["explain", "run", PHOTO, "--out", f"{path}.png"],
    ]
    name = os.fsencode(path).decode(errors="backslashreplace")
    new = [] if name in ("names.txt", "names.txt/x", "run", "photos", ".", "") else [name.split("/")[0]]
    places = [*new, f"{name}.png", f"{name}.safetensors", "run/report.html"]
    return Case(rng.choice(commands), may_change=[place for place in places if place])


def folders(rng: Random, home: Path) -> Case:
    name = rng.choice([*(name for name in NAMES if name), "a" * 200])
    for split in ("train", "test"):
        (home / "photos" / split / "red").rename(home / "photos" / split / name)
    photo = f"photos/test/{name}/0.png"
    commands = [
        [*COOP, "--out", "out"],
        ["evaluate", "run"],
        ["predict", "run", photo],
        ["train", "gallop", *TRAIN, "--out", "out"],
    ]
    return Case(rng.choice(commands), encoding=_encoding(rng))


def full_disk(rng: Random, home: Path) -> Case:
    case = rng.choice(ALL)
    size = rng.choice([0, 1, 100, 300, 1000, 5000])
    return replace(case, may_stay=case.may_change, file_size=size)


def usage(rng: Random, home: Path) -> Case:
    return Case([rng.choice(WORDS) for _ in range(rng.randint(0, 4))], may_change=())


def _encoding(rng: Random) -> str:
    return rng.choice(["utf-8", "ascii", "latin-1", "cp1252"])

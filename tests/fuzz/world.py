"""A small world that every case begins in: a model, photos, two runs, checkpoints and files, a few megabytes in all."""

import argparse
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file

from fastprompt.cli import main
from fastprompt.training import RunFolder

CLASSES = {"dark_blue": (20, 20, 120), "green": (20, 160, 40), "red": (200, 30, 30)}
WIDTH, PATCH_WIDTH = 16, 16
CONFIG = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "width": PATCH_WIDTH, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 1},
}
BACKBONE = ["--backbone", "local-dir:model"]
TRAIN = ["photos", *BACKBONE, "--shots", "2", "--epochs", "1", "--batch-size", "4"]
COOP = ["train", "coop", *TRAIN, "--context", "2"]
IMPORT = ["import", *BACKBONE, "--class-names", "names.txt", "--out", "out"]
PHOTO = "photos/test/red/0.png"


def build(home: Path) -> None:
    """Make the world in an empty folder."""
    rng = np.random.default_rng(0)
    for split, images in (("train", 2), ("test", 1)):
        for name, colour in CLASSES.items():
            (home / "photos" / split / name).mkdir(parents=True)
            for index in range(images):
                pixels = np.clip(np.array(colour) + rng.normal(0, 40, (40, 48, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(home / "photos" / split / name / f"{index}.png")
    _write_model(home / "model")
    _write_texts(home)
    _write_checkpoints(home)
    with inside(home):
        assert main([*COOP, "--out", "run"]) == 0
        with mock.patch.object(RunFolder, "save_model", side_effect=KeyboardInterrupt):
            assert main([*COOP, "--out", "unfinished"]) == 130


@contextmanager
def inside(home: Path):
    """The world as working directory, home, and place of caches and of a Ghostscript that tells of being started."""
    tools = home / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("gs", "gswin32c", "gswin64c"):
        (tools / name).write_text(f"#!/bin/sh\ntouch {home}/canary\n")
        (tools / name).chmod(0o755)
    here = Path.cwd()
    places = {"HOME": home, "FASTPROMPT_CACHE": home / "cache", "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    os.chdir(home)
    try:
        with mock.patch.dict(os.environ, {name: str(place) for name, place in places.items()}):
            yield
    finally:
        os.chdir(here)


def copy(template: Path, home: Path) -> None:
    """The world as it was built; it is always used in one place, since runs name their data with absolute paths."""
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(template, home, symlinks=True)


def _write_model(folder: Path) -> None:
    folder.mkdir()
    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG).eval()
    preprocess = {"mean": [0.5] * 3, "std": [0.25] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": preprocess}))
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )


def _write_texts(home: Path) -> None:
    (home / "names.txt").write_text("dark blue\ngreen\nred\n")
    sentences = {name.replace("_", " "): [f"something {name}", f"{name} noise"] for name in CLASSES}
    (home / "descriptions.json").write_text(json.dumps(sentences))
    entries = {
        split: [[f"{split}/{name}/0.png", label, name] for label, name in enumerate(CLASSES)]
        for split in ("train", "test")
    }
    (home / "split.json").write_text(json.dumps(entries))


def coop_state() -> dict[str, torch.Tensor]:
    """The state_dict of a checkpoint of CoOp for this model."""
    random = torch.Generator().manual_seed(1)
    return {"ctx": torch.randn(2, WIDTH, generator=random)}


def gallop_state() -> dict[str, torch.Tensor]:
    """The state_dict of a checkpoint of GalLoP for this model."""
    random = torch.Generator().manual_seed(2)
    return {
        "global_prompt": torch.randn(2, 3, WIDTH, generator=random),
        "local_prompts": torch.randn(2, 3, WIDTH, generator=random),
        "local_proj.linear.weight": torch.randn(PATCH_WIDTH, PATCH_WIDTH, generator=random),
    }


def _write_checkpoints(home: Path) -> None:
    torch.save({"state_dict": coop_state(), "epoch": 10}, home / "coop.pth.tar")
    arguments = argparse.Namespace(clip_name="clip_vit_b16", topk=[1, 2], global_dropout_p=0.5)
    torch.save({"state_dict": gallop_state(), "args": arguments}, home / "gallop.ckpt")

"""The command line: verbs only. What they do is in the rooms below."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import subcommand

from fastprompt.errors import InputError
from fastprompt.experiment.config import (
    EvaluateConfig,
    ExplainConfig,
    PredictConfig,
    TrainCoOp,
    TrainGalLoP,
    TrainZeroShot,
)

DESCRIPTION = """Prompt learning for CLIP-like models, from a few labelled images to a tested classifier.

A first run: fastprompt train gallop PHOTOS --pretrained openai --shots 16

Then: fastprompt predict RUN_FOLDER picture.jpg

Without data of your own: fastprompt demo"""


@dataclass(frozen=True)
class Train:
    """Train a learner on a few labelled images, test it beside zero-shot CLIP, and write a run folder."""

    config: (
        Annotated[TrainGalLoP, subcommand("gallop", prefix_name=False)]
        | Annotated[TrainCoOp, subcommand("coop", prefix_name=False)]
        | Annotated[TrainZeroShot, subcommand("zero-shot", prefix_name=False)]
    )


@dataclass(frozen=True)
class Doctor:
    """Show versions, devices, which kernels can run here and why others cannot, and what a backbone supports."""

    backbone: str | None = None
    """An open_clip architecture to look at; nothing is downloaded."""


@dataclass(frozen=True)
class Demo:
    """Zero-shot CLIP, CoOp and GalLoP on built-in scenes with a built-in model: no download, a few minutes."""

    out: Path = Path("runs/demo")
    """Folder for images, runs and report.html. An unfinished demo there is resumed."""


Command = (
    Annotated[Train, subcommand("train")]
    | Annotated[EvaluateConfig, subcommand("evaluate")]
    | Annotated[PredictConfig, subcommand("predict")]
    | Annotated[ExplainConfig, subcommand("explain")]
    | Annotated[Doctor, subcommand("doctor")]
    | Annotated[Demo, subcommand("demo")]
)


def run(command: Train | EvaluateConfig | PredictConfig | ExplainConfig | Doctor | Demo) -> None:
    """Carry out one command and print what came of it."""
    # Imports stand here so that --help and usage errors do not wait for torch and open_clip.
    match command:
        case Train(config):
            from fastprompt.experiment.train import train_run

            trained = train_run(config)
            print(f"\n{trained.table.to_text()}\n\nrun folder: {trained.run.path}")
        case EvaluateConfig():
            from fastprompt.experiment.use import evaluate_run

            print(f"\n{evaluate_run(command).to_text()}")
        case PredictConfig():
            from fastprompt.experiment.use import predict_images

            for path, classes in predict_images(command):
                print(f"{path}: " + ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in classes))
        case ExplainConfig():
            from fastprompt.experiment.use import explain_image

            path, name = explain_image(command)
            print(f"patches selected for {name!r}: {path}")
        case Doctor(backbone):
            from fastprompt.doctor import examine

            print(examine(backbone))
        case Demo(out):
            from fastprompt.demo.page import run_demo

            print(run_demo(out))


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    logging.getLogger("fastprompt.backbone.memory").setLevel(logging.INFO)  # what a training step will take
    command = tyro.cli(
        Command,
        prog="fastprompt",
        description=DESCRIPTION,
        args=None if arguments is None else list(arguments),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    try:
        run(command)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InputError, OSError) as error:
        print(f"fastprompt: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupted:  # of training, it says where the work stands
        print(f"fastprompt: {str(interrupted) or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The command line: verbs only. What they do is in the rooms below."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import tyro
from tyro.conf import Positional, arg, subcommand

from fastprompt.console import drop_output, escape_output, explained, parsed, quiet_others, terminable
from fastprompt.errors import printable
from fastprompt.exchange.config import ExportConfig, ImportConfig, WordsConfig
from fastprompt.experiment.config import (
    Config,
    EvaluateConfig,
    ExplainConfig,
    PredictConfig,
)
from fastprompt.version import __version__

DESCRIPTION = """Prompt learning for CLIP-like models, from a few labelled images to a tested classifier.

A first run: fastprompt train gallop PHOTOS --pretrained openai --shots 16

Then: fastprompt predict RUN_FOLDER picture.jpg

Without data of your own: fastprompt demo

Which version this is: fastprompt --version"""


@dataclass(frozen=True)
class Train:
    """Train a learner on a few labelled images, test it beside zero-shot CLIP, and write a run folder."""

    config: None  # in its place stands the configuration of a method where `train` is asked for, see `_train`


@dataclass(frozen=True)
class ListRecipes(Config):
    """List the recipes of all methods, or those of one by data set."""

    method: Annotated[Positional[str | None], arg(metavar="[METHOD]")] = None
    """Method, such as gallop. Default: all of them."""


@dataclass(frozen=True)
class ShowRecipe:
    """Show everything that a recipe decides, and where its numbers stand."""

    method: Annotated[Positional[str], arg(metavar="METHOD")]
    """Method, such as gallop."""
    recipe: Annotated[Positional[str], arg(metavar="[RECIPE]")] = "default"
    """Name of the recipe: default, a data set such as imagenet, or a .json file."""


@dataclass(frozen=True)
class CopyRecipe:
    """Write a recipe to a .json file, to be changed and given to `fastprompt train METHOD --recipe FILE`."""

    method: Annotated[Positional[str], arg(metavar="METHOD")]
    """Method, such as gallop."""
    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """Name of the recipe: default, or a data set such as imagenet."""
    file: Annotated[Positional[Path], arg(metavar="FILE.json")]
    """New file, whose name ends in .json."""


@dataclass(frozen=True)
class Recipes:
    """The hyper-parameters that the methods were published with."""

    action: (
        Annotated[ListRecipes, subcommand("ls", prefix_name=False)]
        | Annotated[ShowRecipe, subcommand("show", prefix_name=False)]
        | Annotated[CopyRecipe, subcommand("copy", prefix_name=False)]
    )


@dataclass(frozen=True)
class Doctor(Config):
    """Show versions, devices, which kernels can run here and why others cannot, and what a backbone supports."""

    backbone: str | None = None
    """An open_clip architecture to look at; nothing is downloaded. Default: none."""


@dataclass(frozen=True)
class Demo:
    """Zero-shot CLIP, CoOp and GalLoP on built-in scenes with a built-in model: no download, a few minutes."""

    out: Path = Path("runs/demo")
    """Folder for images, runs and report.html. An unfinished demo there is resumed."""


OTHER_COMMANDS = {
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "explain": ExplainConfig,
    "recipes": Recipes,
    "import": ImportConfig,
    "export": ExportConfig,
    "words": WordsConfig,
    "doctor": Doctor,
    "demo": Demo,
}


def _with_method(arguments: Sequence[str]) -> list[str]:
    """The arguments with the method of ``train`` as it is registered, however it was spelled."""
    if arguments[:1] != ["train"] or not arguments[1:] or arguments[1].startswith("-"):
        return list(arguments)
    from fastprompt.learners import find_method

    return ["train", find_method(arguments[1]).method, *arguments[2:]]


def _train(arguments: Sequence[str]) -> type[Train]:
    """The train command with a subcommand for every method, with the options of its learner.

    The defaults of the method that is asked for are those of its recipe, in its --help, too.
    """
    if arguments[:1] != ["train"]:
        return Train  # its options are not asked for, and methods are known only where torch is imported
    from fastprompt.experiment.configure import experiment_class
    from fastprompt.learners import METHODS

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", default="default")
    asked, recipe = "".join(arguments[1:2]), parser.parse_known_args(arguments)[0].recipe
    configs = []
    for method in sorted(METHODS):
        config = experiment_class(method, recipe if method == asked else "default")
        # In the list of methods, one line each; the whole description in a method's own help.
        description = None if method == asked else config.__doc__.split("\n\n")[0]
        configs.append(Annotated[config, subcommand(method, prefix_name=False, description=description)])
    made = make_dataclass("Train", [("config", Union[tuple(configs)])], bases=(Train,), frozen=True)  # noqa: UP007
    made.__doc__ = Train.__doc__
    return made


def run(command: object) -> None:
    """Carry out one command and print what came of it."""
    # Here and below, imports stand where they are used, so that --help and usage errors do not wait for torch.
    match command:
        case Train(config):
            _train_and_test(config)
        case Recipes(action):
            print(_recipes(action))
        case EvaluateConfig() | PredictConfig() | ExplainConfig():
            _use(command)
        case ImportConfig() | ExportConfig() | WordsConfig():
            print(_exchange(command))
        case Doctor(backbone):
            from fastprompt.doctor import examine

            print(examine(backbone))
        case Demo(out):
            from fastprompt.demo.page import run_demo

            print(run_demo(out))


def _train_and_test(config: Any) -> None:
    from fastprompt.experiment.recipes import resolved_recipe
    from fastprompt.experiment.train import train_run

    print(resolved_recipe(config))
    trained = train_run(config)
    if trained.found:
        print(f"\n{trained.run.path} is complete: nothing was trained")
    print(f"\n{trained.table.to_text()}\n\nrun folder: {trained.run.path}")


def _use(command: EvaluateConfig | PredictConfig | ExplainConfig) -> None:
    match command:
        case EvaluateConfig():
            from fastprompt.experiment.evaluate import evaluate_run

            print(f"\n{evaluate_run(command).to_text()}")
        case PredictConfig():
            from fastprompt.experiment.predict import predict_images

            for path, classes in predict_images(command):
                print(f"{path}: " + ", ".join(f"{name} {100 * probability:.1f} %" for name, probability in classes))
        case ExplainConfig():
            from fastprompt.experiment.explain import explain_image

            path, name = explain_image(command)
            print(f"patches that speak for {name!r}: {path}")


def _exchange(command: ImportConfig | ExportConfig | WordsConfig) -> str | Path:
    match command:
        case ImportConfig():
            from fastprompt.exchange.import_run import import_run

            return f"run folder: {import_run(command).path}"
        case ExportConfig():
            from fastprompt.exchange.export import export_run

            return export_run(command)
        case WordsConfig():
            from fastprompt.exchange.words import words_of_run

            return words_of_run(command)


def _recipes(action: ListRecipes | ShowRecipe | CopyRecipe) -> str:
    from fastprompt.experiment.recipes import copy_recipe, list_recipes, show_recipe

    match action:
        case ListRecipes(method):
            return list_recipes(method)
        case ShowRecipe(method, recipe):
            return show_recipe(method, recipe)
        case CopyRecipe(method, recipe, file):
            return copy_recipe(method, recipe, file)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments == ["--version"]:
        print(f"fastprompt {__version__}")
        return 0
    escape_output()
    try:
        with terminable(), quiet_others():
            run(_command(arguments))
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        drop_output()
    except KeyboardInterrupt as interrupted:  # of training, it says where the work stands
        print(f"fastprompt: {printable(str(interrupted)) or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(interrupted, "signal", signal.SIGINT)
    except Exception as error:
        if (line := explained(error)) is None:
            raise
        drop_output()
        print(line, file=sys.stderr)
        return 2
    return 0


def _command(arguments: Sequence[str]) -> Any:
    """The command that the arguments stand for."""
    arguments = _with_method(arguments)
    kinds = {"train": _train(arguments), **OTHER_COMMANDS}
    commands = Union[tuple(Annotated[kind, subcommand(name)] for name, kind in kinds.items())]  # noqa: UP007
    return parsed(
        lambda: tyro.cli(
            commands,
            prog="fastprompt",
            description=DESCRIPTION,
            args=arguments,
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        )
    )


if __name__ == "__main__":
    sys.exit(main())

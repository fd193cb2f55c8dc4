"""The help of the command line: settings in groups, positional arguments by name, and settings by name."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import docstring_parser
import pytest

from fastprompt.cli import OTHER_COMMANDS, Recipes, main
from fastprompt.errors import InputError
from fastprompt.experiment.config import BackboneConfig, DataConfig, FeatureConfig, RuntimeConfig, TrainingConfig
from fastprompt.experiment.configure import configure, experiment_class
from fastprompt.learners import METHODS

OURS = sorted(name for name, cls in METHODS.items() if cls.__module__.startswith("fastprompt.learners."))


def help_of(capsys, *command):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("method", OURS)
def test_every_setting_has_one_name_whatever_its_part(method):
    parts = [part for part in get_type_hints(experiment_class(method)).values() if is_dataclass(part)]
    names = [setting.name for part in parts for setting in fields(part)]
    assert len(set(names)) == len(names)
    assert ("shots" in names) is METHODS[method].learns


def test_settings_by_name_make_the_parts():
    config = configure("gallop", "imagenet", data="photos", shots=3, k=(2, 4), lr=0.5, device="cpu", out="run")
    assert (config.data.data, config.training.shots, config.learner.k) == (Path("photos"), 3, (2, 4))
    assert (config.recipe, config.training.lr, config.runtime.device, config.out) == (
        "imagenet",
        0.5,
        "cpu",
        Path("run"),
    )
    assert config.resolved()["data"] == Path("photos").absolute()  # as the command line records it
    with pytest.raises(InputError, match="gallop: expected settings such as shots or backbone, got 'shoots'"):
        configure("gallop", data="photos", shoots=3)


def test_help_shows_groups_names_and_no_defaults_of_nothing(capsys):
    said = help_of(capsys, "train", "gallop")
    assert "[GALLOP OPTIONS] DATA" in said
    for group in ("data", "learner", "training", "backbone", "features", "runtime"):
        assert f"{group} options" in said
    assert said.index("--split-file") < said.index("--global-prompts") < said.index("--shots") < said.index("--device")
    for words in ("Training images per class; 0 for all", "Learning rate of SGD.", "Keep features on disk"):
        assert words in said, "settings keep their own words"


def test_help_of_a_method_without_training_asks_for_none(capsys):
    said = help_of(capsys, "train", "zero-shot")
    assert "--template" in said
    assert "--shots" not in said
    assert "--zero-shot-template" not in said


def test_help_of_all_commands_lists_them(capsys):
    said = help_of(capsys)
    for verb in ("train", "evaluate", "predict", "explain", "recipes", "import", "export", "words", "doctor", "demo"):
        assert f"• {verb} " in said


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        (("predict",), "RUN IMAGE [IMAGE ...]"),
        (("explain",), "RUN IMAGE"),
        (("evaluate",), "RUN [DATA]"),
        (("export",), "RUN"),
        (("words",), "RUN"),
        (("import",), "CHECKPOINT"),
        (("recipes", "show"), "METHOD [RECIPE]"),
        (("recipes", "ls"), "[METHOD]"),
        (("recipes", "copy"), "METHOD RECIPE FILE.json"),
        (("doctor",), ""),
        (("demo",), ""),
        (("train", "dualpt"), "DATA"),
    ],
)
def test_help_names_positional_arguments_and_tells_what_happens_by_default(capsys, command, usage):
    said = help_of(capsys, *command)
    head = " ".join(said.split("\n\n")[0].split())
    assert re.search(rf" {re.escape(usage)}( ?\[?--|$)", head), head
    assert "None" not in said and "(default: )" not in said


PARTS = (DataConfig, TrainingConfig, BackboneConfig, FeatureConfig, RuntimeConfig)


@pytest.mark.parametrize("kind", [*PARTS, *(kind for kind in OTHER_COMMANDS.values() if kind is not Recipes)])
def test_settings_that_may_be_left_out_say_what_happens_then(kind):
    parsed = (docstring_parser.parse_from_object(parent) for parent in kind.__mro__[:-1])
    words = {entry.arg_name: entry.description for found in parsed for entry in found.params}
    left_out = [setting.name for setting in fields(kind) if setting.default in (None, ())]
    assert [name for name in left_out if not re.search("Default: |needed by all others", words[name])] == []

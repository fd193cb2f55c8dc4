"""The help of the command line: settings in groups, positional arguments by name; and back to one configuration."""

import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from fastprompt.cli import OTHER_COMMANDS, Recipes, main
from fastprompt.errors import InputError
from fastprompt.experiment.methods import train_config
from fastprompt.experiment.option_groups import GROUPS, _words, grouped
from fastprompt.learners import METHODS

OURS = sorted(name for name, cls in METHODS.items() if cls.__module__.startswith("fastprompt.learners."))


def help_of(capsys, *command):
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("method", OURS)
def test_every_setting_has_one_group_and_those_of_the_method_their_own(method):
    config = train_config(method)
    groups = {group.name: {setting.name for setting in fields(group.type)} for group in fields(grouped(config))}
    assert groups["method"] == set(config.own_options)
    assert sorted(name for names in groups.values() for name in names) == sorted(s.name for s in fields(config))
    assert set(groups) == set(GROUPS)


def test_groups_give_back_the_same_configuration():
    config = train_config("gallop")
    given = {"data": Path("photos"), "shots": 3, "k": (2, 4), "lr": 0.5, "out": Path("run")}
    settings = {}
    for group in fields(grouped(config)):
        of_group = {setting.name for setting in fields(group.type)}
        settings[group.name] = group.type(**{name: value for name, value in given.items() if name in of_group})
    assert asdict(grouped(config)(**settings).flat()) == asdict(config(**given))
    settings["training"] = type(settings["training"])(recipe="imagenet")
    with pytest.raises(InputError, match="recipe: this configuration was made for 'default'"):
        grouped(config)(**settings).flat()


def test_help_shows_groups_names_and_no_defaults_of_nothing(capsys):
    said = help_of(capsys, "train", "gallop")
    assert "[GALLOP OPTIONS] DATA" in said
    for group in GROUPS:
        assert f"{group} options" in said
    assert "None" not in said
    assert said.index("--shots") < said.index("--global-prompts") < said.index("--lr") < said.index("--precision")
    for words in ("Training images per class; 0 for all", "Learning rate of SGD.", "Keep features on disk"):
        assert words in said, "settings keep their own words"


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
    ],
)
def test_help_names_positional_arguments_and_tells_what_happens_by_default(capsys, command, usage):
    said = help_of(capsys, *command)
    head = " ".join(said.split("\n\n")[0].split())
    assert re.search(rf" {re.escape(usage)}( ?\[?--|$)", head), head
    assert "None" not in said and "(default: )" not in said


@pytest.mark.parametrize("kind", [kind for kind in OTHER_COMMANDS.values() if kind is not Recipes])
def test_settings_that_may_be_left_out_say_what_happens_then(kind):
    words = _words(kind)
    left_out = [setting.name for setting in fields(kind) if setting.default in (None, ())]
    assert [name for name in left_out if not re.search("Default: |needed by all others", words[name])] == []

"""A method's options and recipes on the command line, and the worked example of docs/add_a_method.md."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest

import fastprompt
from fastprompt.cli import main
from fastprompt.errors import InputError
from fastprompt.experiment.config import DataConfig
from fastprompt.experiment.configure import configure, experiment_class
from fastprompt.learners import METHODS, Recipe, ZeroShot

ROOT = Path(__file__).parents[2]


def config_of(run):
    return json.loads(Path(run, "config.json").read_text())


@pytest.fixture
def example(tmp_path):
    """The worked example as a file; the method that it registers is forgotten afterwards."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "add_a_method.md").read_text(), re.DOTALL)
    file = tmp_path / "best_patches.py"
    file.write_text(code)
    yield file
    METHODS.pop("best-patches", None)


def test_the_worked_example_trains_from_outside_the_package(example, photos, common, capsys, monkeypatch):
    arguments = ["train", "best-patches", str(photos), *common, "--k", "3", "--out", "run"]
    monkeypatch.setattr(sys, "argv", [str(example), *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(example), run_name="__main__")
    assert ended.value.code == 0
    assert config_of("run")["k"] == 3
    out = capsys.readouterr().out
    assert "best-patches, recipe default (ours)" in out
    assert re.search(r"^best-patches +\d", out, re.MULTILINE), "the table has no row of the method"
    assert main(["predict", "run", str(photos / "test" / "red")]) == 0
    assert main(["train", "best-patches", str(photos), *common, "--k", "0", "--out", "other"]) == 2
    assert "k: expected at least 1 patch, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_the_worked_example_in_the_folder_of_learners_is_a_method(example, tmp_path):
    home = tmp_path / "package"
    shutil.copytree(ROOT / "fastprompt", home / "fastprompt", ignore=shutil.ignore_patterns("demo", "__pycache__"))
    shutil.copy(example, home / "fastprompt" / "learners")
    path = os.pathsep.join([str(home), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "fastprompt", "train", "best-patches", "--recipe", "imagenet", "--help"]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=home, env={**os.environ, "PYTHONPATH": path}
    )
    assert "--k INT" in ended.stdout
    assert re.search(r"Patches that count for each class\.\s.*\(default: 5\)", ended.stdout)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_option_of_every_method_is_explained(method):
    made = experiment_class(method)
    for option in fields(get_type_hints(made)["learner"]):
        words = next(said.help for said in option.type.__metadata__ if said.help)
        assert len(words) > 10, f"option {option.name} of {method} has no words in the docstring's Args"
    assert len(made.__doc__) > 40


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_recipe_makes_a_configuration(method):
    for name, recipe in METHODS[method].recipes.items():
        config = configure(method, name, data=Path("photos"))
        assert {option: config.options[option] for option in recipe.options} == {
            option: tuple(value) if isinstance(value, list) else value for option, value in recipe.options.items()
        }
        if METHODS[method].learns:
            assert config.settings().batch_size == recipe.batch_size


def test_a_recipe_is_resolved_printed_and_kept(photos, common, capsys):
    given = [argument for argument in common if argument not in ("--batch-size", "8")]
    assert main(["train", "gallop", str(photos), *given, "--recipe", "eurosat", "--k", "2", "--out", "run"]) == 0
    out = capsys.readouterr().out
    assert "gallop, recipe eurosat (GalLoP's code" in out
    assert "epochs 2, batch_size 10, lr 0.002" in out
    assert "precision fp32 (published in fp16)" in out
    assert "k 2, dropout 0.75, context 'a photo of a'" in out
    config = config_of("run")
    assert (config["recipe"], config["batch_size"], config["k"]) == ("eurosat", 10, [2])
    assert config["zero_shot_template"] == "a centered satellite photo of {}."


def test_a_copied_recipe_can_be_changed_and_used(photos, common, capsys):
    assert main(["recipes", "copy", "kgcoop", "oxford_pets", "mine.json"]) == 0
    assert "fastprompt train kgcoop PHOTOS --recipe mine.json" in capsys.readouterr().out
    values = json.loads(Path("mine.json").read_text())
    values["options"]["weight"], values["momentum"] = 2.5, 0.5
    Path("mine.json").write_text(json.dumps(values))
    assert main(["train", "kgcoop", str(photos), *common, "--recipe=mine.json", "--out", "run"]) == 0
    config = config_of("run")
    assert (config["weight"], config["momentum"]) == (2.5, 0.5)
    assert config["template"] == config["zero_shot_template"] == "a photo of a {}, a type of pet."
    assert config["recipe"] == str(Path("mine.json").resolve())
    assert main(["recipes", "copy", "kgcoop", "oxford_pets", "mine.json"]) == 2
    assert "mine.json exists already" in capsys.readouterr().err


def test_recipes_are_listed_and_shown(capsys):
    assert main(["recipes", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {method for method in METHODS if any(line.startswith(method) for line in lines)} == set(METHODS)
    assert "1:50 2:100 4:100 8:200 16:200" in next(line for line in lines if line.startswith("coop"))
    assert main(["recipes", "ls", "gallop"]) == 0
    assert next(line for line in capsys.readouterr().out.splitlines() if line.startswith("eurosat")).split()[1:3] == [
        "200",
        "10",
    ]
    assert main(["recipes", "show", "coop", "few-shot"]) == 0
    shown = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines()[1:])
    assert (shown["context"], shown["position"], shown["weight_decay"]) == ("16", "end", "0.0005")
    assert main(["recipes", "show", "coop", "mars"]) == 2
    assert "recipe: expected one of default, imagenet, few-shot" in capsys.readouterr().err


def test_an_unknown_recipe_of_a_training_is_one_sentence(photos, capsys):
    assert main(["train", "coop", str(photos), "--recipe", "mars"]) == 2
    assert capsys.readouterr().err.startswith("fastprompt: error: recipe: expected one of default")


def test_class_specific_contexts_are_refused_where_other_classes_come(photos, common, capsys, tmp_path):
    arguments = ["train", "coop", str(photos), *common, "--class-specific", "--out", "run"]
    assert main([*arguments, "--classes", "base"]) == 2
    said = capsys.readouterr().err
    assert "coop learned a context for each of its 2 classes" in said and "encoding" not in said
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "--position", "middle"]) == 0
    assert config_of("run")["class_specific"] is True


def test_a_class_without_description_is_named_before_any_image_is_encoded(photos, common, capsys, tmp_path):
    Path("words.json").write_text(json.dumps({name: ["A colour."] for name in ("dark blue", "green", "red")}))
    arguments = ["train", "dualpt", str(photos), *common, "--descriptions", "words.json", "--out", "run"]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert f"fastprompt: error: descriptions {tmp_path / 'words.json'}: has no entry for class 'yellow'\n" in said
    assert "encoding" not in said
    assert not (tmp_path / "run").exists()
    assert main([*arguments, "--weight", "0"]) == 0, "without the weight they are not read"


def test_dual_view_trains_on_images_with_and_without_augmentation(photos, common):
    for flags in ([], ["--augment"]):
        out = f"run{len(flags)}"
        assert main(["train", "dual-view", str(photos), *common, *flags, "--out", out]) == 0
        assert config_of(out)["templates"] == ["a photo of a {}."]


def test_a_configuration_of_another_recipe_is_refused():
    with pytest.raises(InputError, match="recipe: this configuration was made for 'default', got 'imagenet'"):
        experiment_class("gallop")(data=DataConfig(data=Path("photos")), recipe="imagenet")


@pytest.mark.parametrize(
    ("hint", "message"),
    [(str, "option 'device' of clash has the name of a setting"), (None, "option 'device' of clash: expected a type")],
)
def test_an_option_that_cannot_be_one_is_refused(hint, message):
    def init(self, backbone, class_names, *, device="cpu"):
        """Never called."""

    init.__annotations__ = {"device": hint} if hint else {}
    recipes = {"default": Recipe(source="here")}
    try:
        type("Clash", (ZeroShot,), {"method": "clash", "recipes": recipes, "__init__": init})
        with pytest.raises(InputError, match=message):
            experiment_class("clash")
    finally:
        METHODS.pop("clash")


def test_learners_are_reachable_by_class_name():
    for learner in METHODS.values():
        assert getattr(fastprompt.learners, learner.__name__) is learner

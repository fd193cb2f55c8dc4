"""Recipes in words: what there is, what one says, and what a run made of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

from fastprompt.evaluation import Row
from fastprompt.experiment.configure import Experiment, experiment_class
from fastprompt.learners import METHODS, Learner, Recipe, find_method
from fastprompt.learners.recipe import find_recipe, write_recipe
from fastprompt.learners.templates import TEMPLATES
from fastprompt.report import Column, Table

NUMBERS = tuple(field.name for field in fields(Recipe) if field.name not in ("source", "options"))
LISTED = ("epochs", "batch_size", "lr", "weight_decay", "warmup_epochs")


def list_recipes(method: str | None = None) -> str:
    """The recipes of one method, or the default one of every method with the names of the others."""
    if method is None:
        title = "Default recipes; `fastprompt recipes ls METHOD` shows those by data set"
        learners = [METHODS[name] for name in sorted(METHODS)]
        rows = [(learner.method, learner, "default", _further(learner)) for learner in learners]
        last = "further recipes"
    else:
        learner = find_method(method)
        title = f"Recipes of {learner.method}; data sets that are not listed have the default"
        rows = [(name, learner, name, _joined(recipe.options)) for name, recipe in learner.recipes.items()]
        last = "options"
    columns = (*map(Column, LISTED), Column(last))
    lines = [
        Row(label, (*_words(learner, learner.recipes[name], LISTED), words)) for label, learner, name, words in rows
    ]
    return Table(title, columns, tuple(lines), "Method" if method is None else "Recipe").to_text()


def show_recipe(method: str, name: str) -> str:
    """Everything that a recipe decides, the learner's own defaults included."""
    learner = find_method(method)
    recipe = find_recipe(learner, name)
    options = get_type_hints(experiment_class(method, name))["learner"]
    defaults = {option.name: option.default for option in fields(options)}
    numbers = dict(zip(NUMBERS, _words(learner, recipe, NUMBERS), strict=True)) if learner.learns else {}
    values = {"source": recipe.source, **numbers, **{key: _word(value) for key, value in defaults.items()}}
    width = max(map(len, values))
    return "\n".join(
        [f"{learner.method}, recipe {name}", *(f"  {key:{width}}  {value}" for key, value in values.items())]
    )


def copy_recipe(method: str, name: str, file: Path) -> str:
    """Write a recipe to a new .json file; returns how it is used."""
    learner = find_method(method)
    write_recipe(learner, find_recipe(learner, name), file)
    return f"{file}: change it, then `fastprompt train {learner.method} PHOTOS --recipe {file}`"


def resolved_recipe(config: Experiment) -> str:
    """What a run will do: its recipe, with everything that was given instead."""
    recipe = find_recipe(find_method(config.method), config.recipe)
    lines = [f"{config.method}, recipe {config.recipe} ({recipe.source})"]
    if (settings := config.settings()) is not None:
        published = "" if recipe.precision == config.backbone.precision else f" (published in {recipe.precision})"
        lines.append(f"  {_joined(asdict(settings))}, precision {config.backbone.precision}{published}")
    return "\n".join([*lines, f"  {_joined(config.options)}"])


def _further(learner: type[Learner]) -> str:
    """The names of a method's recipes but the default."""
    names = [name for name in learner.recipes if name != "default"]
    if set(TEMPLATES) <= set(names):
        names = [f"each of {len(TEMPLATES)} data sets", *(name for name in names if name not in TEMPLATES)]
    return ", ".join(names)


def _words(learner: type[Learner], recipe: Recipe, names: Sequence[str]) -> list[str | None]:
    """Numbers of a recipe as they would be typed; nothing where nothing is trained."""
    return [_word(getattr(recipe, name)) if learner.learns else None for name in names]


def _joined(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_word(value)}" for name, value in values.items())


def _word(value: Any) -> str:
    """A value as it would be typed; epochs by shots as 1:50 4:100."""
    if isinstance(value, Mapping):
        return " ".join(f"{key}:{of_key}" for key, of_key in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_word, value))
    return repr(value) if isinstance(value, str) and " " in value else str(value)

"""How a method was published: its training, as numbers, and the options of its learner."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, get_type_hints

from fastprompt.documents import build, check_object, check_type, home_path, read_json, short
from fastprompt.errors import InputError, listed
from fastprompt.files import write_file
from fastprompt.learners.schedule import Schedule
from fastprompt.learners.templates import TEMPLATES


@dataclass(frozen=True, kw_only=True)
class Recipe(Schedule):
    """The published hyper-parameters of a method, beside those of ``Schedule``.

    Attributes:
        source: where the numbers stand.
        epochs: passes over the training images, or by the number of shots: {1: 50, 4: 100, 16: 200}.
        precision: what the authors trained in. A record: ``fastprompt train`` runs in float32 unless told otherwise.
        options: arguments of the learner that differ from its defaults.
    """

    source: str
    precision: str = "fp16"
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    def epochs_for(self, shots: int | None) -> int:
        """Epochs for a number of shots: those of the next larger number that is known; None means all images."""
        if isinstance(self.epochs, int):
            return self.epochs
        known = sorted(self.epochs)
        return self.epochs[next((number for number in known if shots is not None and shots <= number), known[-1])]

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON takes it."""
        values = {name.name: getattr(self, name.name) for name in fields(self)}
        epochs = self.epochs if isinstance(self.epochs, int) else dict(self.epochs)
        return values | {"epochs": epochs, "options": dict(self.options)}


class Method(Protocol):
    """What recipes need of the class of a learner."""

    method: ClassVar[str]
    recipes: ClassVar[Mapping[str, Recipe]]


def find_recipe(learner: type[Method], name: str) -> Recipe:
    """A recipe of a method by its name, or from a file.

    Args:
        learner: class of the method.
        name: "default", a data set (one without a recipe of its own was trained with the default), or a .json file as
            ``write_recipe`` writes it.

    Raises:
        InputError: there is no such recipe, or the file does not hold a recipe of this method.
    """
    if name.endswith(".json"):
        return _read_recipe(learner, home_path(name))
    if name in TEMPLATES:
        return learner.recipes.get(name, learner.recipes["default"])
    if name not in learner.recipes:
        known = ", ".join(dict.fromkeys([*learner.recipes, *TEMPLATES]))
        raise InputError(f"recipe: expected one of {known}, or a .json file, got {name!r}")
    return learner.recipes[name]


def write_recipe(learner: type[Method], recipe: Recipe, file: Path) -> None:
    """Write a recipe to a new .json file, to be changed and given back to ``find_recipe``.

    Raises:
        InputError: the name does not end in .json, or the file exists.
    """
    if file.suffix != ".json":
        raise InputError(f"file: expected a name that ends in .json, got {file}")
    if file.exists():
        raise InputError(f"file: {file} exists already")
    write_file(file, json.dumps({"method": learner.method, **recipe.to_dict()}, indent=2) + "\n")


def _read_recipe(learner: type[Method], file: Path) -> Recipe:
    where = f"recipe {file}"
    values = read_json(file, "recipe")
    check_object(values, where, ["method", "epochs"])
    if (method := values.pop("method")) != learner.method:
        raise InputError(f"{where}: expected one of {learner.method}, got one of {short(method)}")
    if isinstance(values["epochs"], dict):  # JSON knows no numbers as names
        shots = values["epochs"]
        values["epochs"] = {int(number) if number.isdecimal() else number: shots[number] for number in shots}
    recipe = build(Recipe, values, where)
    check_options(learner, recipe.options, where)
    return recipe


def check_options(learner: type[Method], options: Mapping[str, Any], where: str) -> None:
    """Raise ``InputError`` unless options have names and types of keyword arguments of a learner.

    Args:
        learner: class of the method.
        options: some or all of its options.
        where: how messages call what they come from.
    """
    hints = get_type_hints(learner.__init__)
    known = list(learner.option_parameters())
    for name, value in options.items():
        if name not in known:
            raise InputError(f"{where}: {learner.method} has no option {name!r}, only {listed(known)}")
        check_type(value, hints[name], f"{where}: {name}")

"""The configuration of training one method, made from its learner: the arguments, their types, defaults and words."""

from __future__ import annotations

import inspect
from dataclasses import Field, field, fields, make_dataclass
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import docstring_parser
from tyro.conf import arg

from fastprompt.errors import InputError
from fastprompt.experiment.config import ExperimentConfig, TrainConfig
from fastprompt.learners import Learner, find_method
from fastprompt.learners.recipe import Recipe, find_recipe
from fastprompt.learners.zero_shot import ZeroShot


def train_config(method: str, recipe: str = "default") -> type[ExperimentConfig]:
    """The configuration class of a method: ``TrainConfig`` with the learner's own options, whose help they carry.

    Args:
        method: as on the command line.
        recipe: gives the defaults of the options; see ``find_recipe``.

    Raises:
        InputError: no such method or recipe, or an option has the name of a setting of every run.
    """
    learner = find_method(method)
    base = TrainConfig if learner.learns else ExperimentConfig
    chosen = find_recipe(learner, recipe)
    options = _options(learner, chosen)
    for name in options:
        if name in {setting.name for setting in fields(base)}:
            raise InputError(f"option {name!r} of {method} has the name of a setting of every run: rename it")
    settings = [("recipe", str, field(default=recipe))]
    if learner.learns:
        settings.append(("zero_shot_template", str, field(default=_zero_shot_template(chosen, recipe))))
    namespace = {"method": learner.method, "own_options": tuple(options), "files": learner.files, "made_for": recipe}
    made = make_dataclass(
        f"Train{learner.__name__}",
        [*settings, *((name, *typed) for name, typed in options.items())],
        bases=(base,),
        namespace=namespace | {"__module__": __name__},
        frozen=True,
        kw_only=True,
    )
    made.__doc__ = _description(learner)
    return made


def _options(learner: type[Learner], recipe: Recipe) -> dict[str, tuple[Any, Field]]:
    """Type and dataclass field of every keyword argument of a learner."""
    hints = get_type_hints(learner.__init__)
    words = {entry.arg_name: entry.description for entry in docstring_parser.parse(learner.__doc__ or "").params}
    parameters = learner.option_parameters()
    if unknown := recipe.options.keys() - parameters.keys():
        raise InputError(f"recipe: {learner.method} has no option {min(unknown)!r}")
    options = {}
    for name, parameter in parameters.items():
        if name not in hints:
            raise InputError(f"option {name!r} of {learner.method}: expected a type, got none")
        default = recipe.options.get(name, parameter.default)
        default = tuple(default) if isinstance(default, list) else default
        given = field() if default is inspect.Parameter.empty else field(default=default)
        options[name] = Annotated[_strings_last(hints[name]), arg(help=_sentence(words.get(name)))], given
    return options


def _strings_last(hint: Any) -> Any:
    """A union with its strings behind the other types: the command line tries them in order, and a string takes all."""
    if get_origin(hint) not in (Union, UnionType):
        return hint
    return Union[tuple(sorted(get_args(hint), key=lambda member: member is str))]  # noqa: UP007


def _sentence(words: str | None) -> str:
    text = " ".join((words or "").split())
    return text[:1].upper() + text[1:]


def _description(learner: type[Learner]) -> str:
    """The class docstring without its sections."""
    parsed = docstring_parser.parse(learner.__doc__ or "")
    return "\n\n".join(part for part in (parsed.short_description, parsed.long_description) if part)


def _zero_shot_template(recipe: Recipe, name: str) -> str:
    """The sentence that belongs to a recipe: the learner's own, or that of the data set."""
    default = ZeroShot.option_parameters()["template"].default
    of_dataset = ZeroShot.recipes.get(name, ZeroShot.recipes["default"]).options.get("template", default)
    return recipe.options.get("template", of_dataset)

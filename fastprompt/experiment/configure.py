"""The configuration of training one method: parts that all share, and the learner's own options with their words."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints

import docstring_parser
from tyro.conf import Suppress, arg

from fastprompt.documents import absolute_path, home_path
from fastprompt.errors import InputError
from fastprompt.experiment.config import (
    BackboneConfig,
    Config,
    DataConfig,
    FeatureConfig,
    RuntimeConfig,
    TrainingConfig,
)
from fastprompt.learners import Learner, find_method
from fastprompt.learners.recipe import Recipe, find_recipe
from fastprompt.learners.zero_shot import ZeroShot
from fastprompt.training import TrainingSettings, published_settings


@dataclass(frozen=True, kw_only=True)
class Experiment(Config):
    """What a run is asked for, part by part. ``experiment_class`` makes the class of one method.

    Methods that learn nothing have no part ``training``.
    """

    method: ClassVar[str]
    made_for: ClassVar[str]

    data: DataConfig
    learner: Any
    training: Suppress[TrainingConfig | None] = None
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    recipe: str = "default"
    """Published settings to start from, by name (`fastprompt recipes ls`), or a file of `fastprompt recipes copy`."""
    out: Path | None = None
    """Run folder. Default: runs/DATASET/METHOD/BACKBONE/... An unfinished run there is resumed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.training is not None and self.training.views and not self.features.cache:
            count = self.training.views
            raise InputError(f"views: {count} views are kept in the feature cache, but --no-cache is given")
        if self.recipe != self.made_for:
            raise InputError(f"recipe: this configuration was made for {self.made_for!r}, got {self.recipe!r}")

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of the method's learner, files with absolute paths: a run is used from other folders, too."""
        options = {option.name: getattr(self.learner, option.name) for option in fields(self.learner)}
        return options | {name: str(file) for name, file in self.files.items()}

    @property
    def files(self) -> dict[str, Path]:
        """The files that the method's learner reads, by the options that name them."""
        given = {name: getattr(self.learner, name) for name in find_method(self.method).files}
        return {name: absolute_path(home_path(file)) for name, file in given.items() if file is not None}

    @property
    def run_name(self) -> str:
        """Last part of the default run folder, such as shots16-seed1, or shots16-seed1-base."""
        if self.training is None:
            return self.data.classes
        shots = f"shots{self.training.shots}" if self.training.shots else "all"
        return f"{shots}-seed{self.training.seed}" + ("" if self.data.classes == "all" else f"-{self.data.classes}")

    def settings(self) -> TrainingSettings | None:
        """The settings of the recipe, with what was given instead; None where nothing is trained."""
        if self.training is None:
            return None
        given = self.training.given()
        if given.get("epochs") == 1:
            given["warmup_epochs"] = 0  # a single epoch of warm-up would train nothing
        recipe = find_recipe(find_method(self.method), self.recipe)
        return replace(published_settings(recipe, self.training.shots or None), seed=self.training.seed, **given)

    def zero_shot_template(self) -> str:
        """The sentence of the zero-shot row: the one given, that of the learner's recipe, or that of its data set."""
        if self.training is not None and self.training.zero_shot_template is not None:
            return self.training.zero_shot_template
        default = ZeroShot.option_parameters()["template"].default
        of_dataset = ZeroShot.recipes.get(self.recipe, ZeroShot.recipes["default"]).options.get("template", default)
        return find_recipe(find_method(self.method), self.recipe).options.get("template", of_dataset)

    def resolved(self) -> dict[str, Any]:
        """What decides the result: all but where it runs, how images are read, and where files go."""
        chosen = {"method": self.method, "recipe": self.recipe, **asdict(self.data), **self.options}
        if self.recipe.endswith(".json"):
            chosen["recipe"] = absolute_path(home_path(self.recipe))
        chosen |= self.backbone.absolute()
        if self.training is not None:
            chosen |= asdict(self.training) | asdict(self.settings())
            chosen["zero_shot_template"] = self.zero_shot_template()
        return {name: absolute_path(value) if isinstance(value, Path) else value for name, value in chosen.items()}


def configure(method: str, recipe: str = "default", **given: Any) -> Experiment:
    """Make the configuration of a run from settings by their names, as the command line takes them.

    Args:
        method: as on the command line.
        recipe: gives the defaults; see ``find_recipe``.
        given: settings of any part, such as ``data``, ``shots`` or ``backbone``, and options of the method.

    Raises:
        InputError: no such method, recipe or setting, or a value out of its range.
    """
    made = experiment_class(method, recipe)
    parts = {name: part for name, part in get_type_hints(made).items() if is_dataclass(part)}
    chosen = {}
    for name, part in parts.items():
        own = {setting.name: given.pop(setting.name) for setting in fields(part) if setting.name in given}
        chosen[name] = part(**own)
    if unknown := given.keys() - {"out"}:
        raise InputError(f"{method}: expected settings such as shots or backbone, got {min(unknown)!r}")
    return made(**chosen, recipe=recipe, **given)


def experiment_class(method: str, recipe: str = "default") -> type[Experiment]:
    """Make the configuration class of a method: ``Experiment`` with the learner's own options, whose help they carry.

    Args:
        method: as on the command line.
        recipe: gives the defaults of the options; see ``find_recipe``.

    Raises:
        InputError: no such method or recipe, or an option has the name of a setting of every run.
    """
    learner = find_method(method)
    options = _options(learner, find_recipe(learner, recipe))
    shared = (Experiment, DataConfig, TrainingConfig, BackboneConfig, FeatureConfig, RuntimeConfig)
    if taken := options.keys() & {setting.name for part in shared for setting in fields(part)}:
        raise InputError(f"option {min(taken)!r} of {method} has the name of a setting of every run: rename it")
    of_learner = make_dataclass(
        f"{learner.__name__}Options", [(name, *typed) for name, typed in options.items()], bases=(Config,), frozen=True,
        kw_only=True, namespace={"__doc__": "What the method itself asks for.", "__module__": __name__},
    )  # fmt: skip
    parts: list[Any] = [("learner", of_learner, _defaults(of_learner)), ("recipe", str, field(default=recipe))]
    if learner.learns:
        parts.append(("training", TrainingConfig, field(default_factory=TrainingConfig)))
    named = {"method": learner.method, "made_for": recipe, "__module__": __name__, "__doc__": _description(learner)}
    return make_dataclass(
        f"Train{learner.__name__}", parts, bases=(Experiment,), namespace=named, frozen=True, kw_only=True
    )


def _defaults(options: type) -> Any:
    """A field of options at their defaults; without one where an option has none."""
    required = any(option.default is MISSING for option in fields(options))
    return field() if required else field(default_factory=options)


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

"""What the help of the command line says of settings: those of a training run by what they are about."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import docstring_parser
from tyro.conf import arg

from fastprompt.experiment.config import BackboneConfig, ExperimentConfig, FeatureConfig, TextConfig

# Where a setting is looked for; what is in no group is an option of the method itself.
GROUPS = {
    "data": ("data", "split_file", "keep_underscores", "classes", "shots", "sampler"),
    "method": (),
    "training": ("recipe", "seed", "epochs", "batch_size", "lr", "weight_decay", "augment", "views", "image_memory"),
    "backbone": tuple(setting.name for config in (BackboneConfig, TextConfig) for setting in fields(config)),
    "features": tuple(setting.name for setting in fields(FeatureConfig)),
    "output": ("out", "zero_shot_template"),
}
WORDS = {
    "data": "Which images, and how many of them to train on.",
    "method": "What the method itself asks for.",
    "training": "How it is trained.",
    "backbone": "Which frozen model, and where it runs.",
    "features": "How images become features, and what is kept of them.",
    "output": "What is written, and what the result is compared with.",
}
PLAIN = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH", bool: "{True,False}"}

T = TypeVar("T")


@dataclass(frozen=True)
class Grouped:
    """The settings of a run by group, as the command line reads them."""

    def flat(self) -> ExperimentConfig:
        """The configuration that they make up; ``InputError`` where it does not hold together."""
        groups = [getattr(self, group.name) for group in fields(self)]
        return self.made_from(**{name.name: getattr(group, name.name) for group in groups for name in fields(group)})


def grouped(config: type[ExperimentConfig]) -> type[Grouped]:
    """The class by which the command line reads a configuration: its settings, each in its group.

    Args:
        config: of one method, by ``train_config``.
    """
    group_of = {name: group for group, names in GROUPS.items() for name in names}
    members: dict[str, list] = {group: [] for group in GROUPS}
    for setting in _settings(config):
        members[group_of.get(setting[0], "method")].append(setting)
    made = []
    for group, settings in members.items():
        if settings:
            of_group = make_dataclass(group.capitalize(), settings, frozen=True, kw_only=True)
            of_group.__doc__ = WORDS[group]
            made.append((group, of_group))
    whole = make_dataclass(
        config.__name__, made, bases=(Grouped,), namespace={"made_from": config, "__module__": __name__}, frozen=True
    )
    whole.__doc__ = config.__doc__
    return whole


def described(config: type[T]) -> type[T]:
    """The class by which the command line reads a configuration that has no groups; its instances are of both."""
    made = make_dataclass(config.__name__, _settings(config), bases=(config,), frozen=True, kw_only=True)
    made.__doc__ = config.__doc__
    return made


def _settings(config: type) -> list[tuple[str, Any, Any]]:
    """The fields of a configuration, as ``make_dataclass`` takes them."""
    hints, kinds, words = get_type_hints(config, include_extras=True), get_type_hints(config), _words(config)
    return [
        (
            setting.name,
            _described(setting, hints[setting.name], kinds[setting.name], words.get(setting.name)),
            field() if setting.default is MISSING else field(default=setting.default),
        )
        for setting in fields(config)
    ]


def _described(setting: Field, hint: Any, kind: Any, words: str | None) -> Any:
    """The type of a setting with its words; nothing, which stands for a default that these tell, is not mentioned."""
    said: dict[str, Any] = {"help": words} if words else {}
    if setting.default in (None, ()):
        said["help_behavior_hint"] = ""
    elif setting.default is MISSING:
        said["help_behavior_hint"] = "(required)"
    if setting.default is None and get_origin(hint) is not Annotated:  # which would bring a name of its own
        said["metavar"] = "|".join(PLAIN[kind] for kind in get_args(kind) if kind is not type(None))
    return Annotated[hint, arg(**said)]


@cache
def _words(config: type) -> dict[str, str]:
    """What configuration classes say of their settings; those of a method bring their words themselves."""
    parsed = (docstring_parser.parse_from_object(parent) for parent in reversed(config.__mro__[:-1]))
    return {entry.arg_name: " ".join(entry.description.split()) for found in parsed for entry in found.params}

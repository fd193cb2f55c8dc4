"""The settings of a training run in groups, so that the help of the command line shows them by what they are about."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import docstring_parser
from tyro.conf import arg

from fastprompt.experiment.config import BackboneConfig, ExperimentConfig, FeatureConfig, TextConfig, TrainConfig

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
PLAIN = {int: "INT", float: "FLOAT", str: "STR", Path: "PATH"}


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
    hints, kinds = get_type_hints(config, include_extras=True), get_type_hints(config)
    members: dict[str, list] = {group: [] for group in GROUPS}
    for setting in fields(config):
        group = group_of.get(setting.name, "method")
        hint = _described(setting, hints[setting.name], kinds[setting.name])
        members[group].append((setting.name, hint, _copied(setting)))
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


def _copied(setting: Field) -> Any:
    return field() if setting.default is MISSING else field(default=setting.default)


def _described(setting: Field, hint: Any, kind: Any) -> Any:
    """The type of a setting with its words; None, which stands for a default that the words tell, is not mentioned."""
    said: dict[str, Any] = {"help": words} if (words := _words().get(setting.name)) else {}
    if setting.default is None:
        said["help_behavior_hint"] = ""
        said["metavar"] = "|".join(PLAIN[kind] for kind in get_args(kind) if kind is not type(None))
    return Annotated[hint, arg(**said)]


@cache
def _words() -> dict[str, str]:
    """What the configuration classes say of their settings; those of a method bring their words themselves."""
    parsed = (docstring_parser.parse_from_object(parent) for parent in TrainConfig.__mro__[:-1])
    return {entry.arg_name: " ".join(entry.description.split()) for found in parsed for entry in found.params}

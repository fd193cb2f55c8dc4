"""A learner stands on a backbone without owning it: copies share it, and pickles leave it out."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from fastprompt.backbone import Backbone
from fastprompt.errors import InputError

Held = TypeVar("Held", bound="BackboneHolder")


def check_backbone(backbone: Backbone) -> None:
    """Raise ``InputError`` for anything else than a backbone, such as its name."""
    if not isinstance(backbone, Backbone):
        raise InputError(f"backbone: expected what load_backbone returns, got {type(backbone).__name__}")


class BackboneHolder(nn.Module):
    """A module whose ``backbone`` is no submodule of it.

    Copies, deep ones too, share the backbone. A pickle is what was learned and how, without the backbone: set
    ``backbone`` again before use.
    """

    _backbone: Backbone | dict[str, Any]  # its name, weights and fingerprint while it is not there

    @property
    def backbone(self) -> Backbone:
        """The frozen model.

        Raises:
            InputError: the learner was unpickled, and its backbone was not set again.
        """
        if isinstance(self._backbone, dict):
            name, weights, patches = (self._backbone[name] for name in ("name", "pretrained", "patches"))
            raise InputError(
                f"backbone: a pickled {type(self).__name__} comes without it: set "
                f"learner.backbone = load_backbone({name!r}, {weights!r}, patches={patches!r})"
            )
        return self._backbone

    @backbone.setter
    def backbone(self, backbone: Backbone) -> None:
        check_backbone(backbone)
        before = self.__dict__.get("_backbone", backbone)
        known = before["fingerprint"] if isinstance(before, dict) else before.fingerprint
        if backbone.fingerprint != known:
            raise InputError(
                f"backbone: expected the weights with fingerprint {known} that this {type(self).__name__} was made "
                f"on, got {backbone.name!r} with {backbone.fingerprint}"
            )
        self.__dict__["_backbone"] = backbone  # past nn.Module, which would register it as a submodule

    @property
    def backbone_label(self) -> str:
        """Name and weights of the backbone, whether or not it is there: "ViT-B-16 openai"."""
        held = self._backbone
        named = (held["name"], held["pretrained"]) if isinstance(held, dict) else (held.name, held.pretrained)
        return " ".join(filter(None, named))

    def __setattr__(self, name: str, value: object) -> None:
        if name == "backbone":  # past nn.Module, which would not ask the property
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def __copy__(self: Held) -> Held:
        """A module that shares everything with this one."""
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self: Held, memo: dict[int, Any]) -> Held:
        """A module with learned tensors of its own on the same backbone."""
        memo[id(self._backbone)] = self._backbone
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        held = self._backbone
        if isinstance(held, Backbone):
            held = {name: getattr(held, name) for name in ("name", "pretrained", "patches", "fingerprint")}
        return {**self.__dict__, "_backbone": held}

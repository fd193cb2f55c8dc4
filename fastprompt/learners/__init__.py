"""Prompt learners, one file a method.

Every module of this folder is imported, so that a new file is a new method, and so are the modules that installed
packages name under the entry points of the group ``fastprompt.methods``.
"""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pkgutil import iter_modules

from fastprompt.backbone import Backbone
from fastprompt.errors import InputError
from fastprompt.learners.base import METHODS, OOD_KINDS, Learner, Scores
from fastprompt.learners.cocoop import CoCoOp
from fastprompt.learners.coop import CoOp
from fastprompt.learners.copl import CoPL
from fastprompt.learners.dual_view import DualView
from fastprompt.learners.dualpt import DuAlPT
from fastprompt.learners.gallop import GalLoP
from fastprompt.learners.kgcoop import KgCoOp
from fastprompt.learners.locoop import LoCoOp
from fastprompt.learners.plot import PLOT
from fastprompt.learners.prograd import ProGrad
from fastprompt.learners.recipe import Recipe, check_options
from fastprompt.learners.sot_glp import SOTGLP
from fastprompt.learners.text import TextLearner
from fastprompt.learners.zero_shot import ZeroShot

__all__ = [
    "METHODS",
    "OOD_KINDS",
    "PLOT",
    "SOTGLP",
    "CoCoOp",
    "CoOp",
    "CoPL",
    "DuAlPT",
    "DualView",
    "GalLoP",
    "KgCoOp",
    "Learner",
    "LoCoOp",
    "ProGrad",
    "Recipe",
    "Scores",
    "TextLearner",
    "ZeroShot",
    "find_method",
    "make_learner",
]

for _module in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")


def _import_methods(package: EntryPoint) -> None:
    """Import another package's module of methods, or say why that cannot be done."""
    try:
        import_module(package.module)  # not load(): the package itself may be what imports this module
    except Exception:  # another's fault, which must not take all methods along
        logging.getLogger(__name__).exception("methods of %s cannot be used: %s", package.dist.name, package.value)


for _package in entry_points(group="fastprompt.methods"):
    _import_methods(_package)


def find_method(method: str) -> type[Learner]:
    """Find the class of a method by its name in any spelling: "sot-glp", "SOTGLP", "Sot_GLP".

    Raises:
        InputError: no method has that name; the sentence suggests the nearest one.
    """
    if method in METHODS:
        return METHODS[method]
    spellings: dict[str, set[str]] = {}
    for name, learner in METHODS.items():
        for known in (name, learner.__name__):
            spellings.setdefault(_letters(known), set()).add(name)
    found = spellings.get(_letters(str(method)), set())
    if len(found) == 1:
        return METHODS[found.pop()]
    near = difflib.get_close_matches(_letters(str(method)), spellings, n=1)
    hint = f": did you mean {' or '.join(sorted(spellings[near[0]]))}?" if near else ""
    raise InputError(f"method: expected one of {', '.join(sorted(METHODS))}, got {method!r}{hint}")


def _letters(name: str) -> str:
    """A name without what its spellings differ in: case, spaces and marks."""
    return re.sub(r"[\W_]", "", name).casefold()


def make_learner(method: str, backbone: Backbone, class_names: Sequence[str], **options: object) -> Learner:
    """Make the learner of a method by its name, as `find_method` reads it; ``options`` as in its class.

    Raises:
        InputError: no such method, no such option, or one of another type or out of its range.
    """
    learner = find_method(method)
    check_options(learner, options, learner.method)
    return learner(backbone, class_names, **options)

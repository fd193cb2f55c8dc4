"""The kinds of malformed input, by name: each makes one case of the small world."""

from collections.abc import Callable
from pathlib import Path
from random import Random

from tests.fuzz import argument_kinds, file_kinds
from tests.fuzz.case import Case

KINDS: dict[str, Callable[[Random, Path], Case]] = {
    name: make
    for module in (file_kinds, argument_kinds)
    for name, make in vars(module).items()
    if callable(make) and getattr(make, "__module__", "") == module.__name__ and not name.startswith("_")
}

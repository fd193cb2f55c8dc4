"""Files that people write or may damage, read in one place: text, JSON, and values of the types that are expected."""

from __future__ import annotations

import codecs
import json
import math
import os
import reprlib
from collections.abc import Iterable
from dataclasses import MISSING, fields
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from fastprompt.errors import InputError

MOST_BYTES = 2**28
DEEPEST = 100  # levels of lists and objects; ours have five

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}

T = TypeVar("T")


def home_path(path: str | Path) -> Path:
    """Expand a leading ``~`` or ``~user``.

    Raises:
        InputError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"path {path}: expected the name of a user behind ~, got {Path(path).parts[0]}") from error


def absolute_path(path: str | Path) -> Path:
    """Make a path absolute, behind its symbolic links; those that go in a circle stay, for whoever reads to refuse."""
    return Path(os.path.realpath(path))  # Path.resolve raises over a circle before Python 3.13


def check_file(file: Path, what: str) -> None:
    """Raise ``InputError`` unless there is a regular file: a pipe would be waited for without end.

    Args:
        file: to be read.
        what: how messages call it, such as "recipe".
    """
    if not file.is_file():
        found = "something else" if file.exists() else "no such file"
        raise InputError(f"{what} {file}: expected a file, got {found}")


def read_text(file: Path, what: str) -> str:
    """Read a text file in UTF-8, or in UTF-16 if it begins with a byte order mark, which is not part of the text.

    Args:
        file: to be read.
        what: how messages call it, such as "class names".

    Raises:
        InputError: no such file, not a regular one, one over 256 MiB, or another encoding.
    """
    check_file(file, what)
    if (size := file.stat().st_size) > MOST_BYTES:
        raise InputError(f"{what} {file}: expected at most {MOST_BYTES:,} bytes, got {size:,}")
    return decode(file.read_bytes(), f"{what} {file}")


def decode(content: bytes, where: str) -> str:
    """The text in some bytes; see ``read_text``."""
    encoding = next((encoding for mark, encoding in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: expected text in UTF-8, got byte {error.start} that is not ({error.reason})"
        ) from error


def read_json(file: Path, what: str) -> Any:
    """Read a JSON file; see ``read_text`` and ``parse_json``."""
    return parse_json(read_text(file, what), f"{what} {file}")


def parse_json(text: str, where: str) -> Any:
    """Parse JSON.

    Args:
        text: one value.
        where: how messages call it, such as "recipe mine.json".

    Raises:
        InputError: not JSON, an object with a name twice, or more than 100 levels.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise InputError(f"{where}: expected JSON, got more than {DEEPEST} levels of it") from error
    except ValueError as error:
        raise InputError(f"{where}: expected JSON, got something else ({error})") from error
    level = [value]
    for _ in range(DEEPEST):
        level = [inner for outer in level for inner in _inside(outer) if isinstance(inner, list | dict)]
    if level:
        raise InputError(f"{where}: expected JSON, got more than {DEEPEST} levels of it")
    return value


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object names {short(next(name for name in names if names.count(name) > 1))} twice")
    return made


def build(kind: type[T], values: Any, where: str) -> T:
    """Make a dataclass of a JSON object that has its fields and no others, each of its type.

    Args:
        kind: the dataclass.
        values: the object; fields with a default may be left out.
        where: how messages call it.

    Raises:
        InputError: not an object, a name too few or too many, or a value of another type.
    """
    known = {field.name: field for field in fields(kind)}
    needed = [name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING]
    check_object(values, where, needed)
    if unknown := values.keys() - known.keys():
        raise InputError(f"{where}: expected no value {min(unknown)!r}")
    hints = get_type_hints(kind)
    for name, value in values.items():
        check_type(value, hints[name], f"{where}: {name}")
    return kind(**values)


def check_object(values: Any, where: str, needed: Iterable[str] = ()) -> None:
    """Raise ``InputError`` unless a value is a JSON object with these names, among others."""
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected a JSON object, got {short(values)}")
    if absent := [name for name in needed if name not in values]:
        raise InputError(f"{where}: expected a value {absent[0]!r}, got none")


def check_type(value: Any, hint: Any, where: str) -> None:
    """Raise ``InputError`` unless a value is of a type, the items of lists and mappings included.

    A whole number is a float, too; true and false are no numbers.
    """
    import typeguard  # here, so that files are locked and replaced where it is not installed

    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    try:
        if isinstance(value, bool) and not {bool, object, Any} & set(members):
            raise typeguard.TypeCheckError("a truth value")
        typeguard.check_type(value, hint, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
    except typeguard.TypeCheckError as error:
        expected = str(hint) if get_args(hint) else hint.__name__
        for prefix in ("collections.abc.", "typing."):
            expected = expected.replace(prefix, "")
        raise InputError(f"{where}: expected {expected}, got {short(value)}") from error


def check_number(value: Any, where: str) -> None:
    """Raise ``InputError`` where a number, or one of a list, is not finite or does not fit into 64 bits.

    Values that are no numbers pass.
    """
    for one in value if isinstance(value, list | tuple) else [value]:
        if isinstance(one, int) and not -(2**63) <= one < 2**63:
            raise InputError(f"{where}: expected a whole number of at most 64 bits, got {short(one)}")
        if isinstance(one, float) and not math.isfinite(one):
            raise InputError(f"{where}: expected a finite number, got {one}")


def short(value: Any) -> str:
    """A value as a message shows it: the beginning, however large it is."""
    return "nothing" if value is None else _SHORT.repr(value)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80

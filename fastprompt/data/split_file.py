"""A data set folder with a split file in the format of CoOp: ``{"train": [[path, label, class name], ...], ...}``."""

import json
from pathlib import Path
from typing import Any

from fastprompt.data.images import Dataset, LabelledImages, readable_name
from fastprompt.errors import InputError

_Entry = tuple[str, int, str]  # path, label, class name
_REQUIRED = ("train", "test")


def find_split_file(root: Path) -> Path | None:
    """Return the split file directly in ``root``: ``split_zhou_*.json``, or else ``split*.json``; None without one.

    Raises:
        InputError: If there are several to choose from.
    """
    for pattern in ("split_zhou_*.json", "split*.json"):
        found = sorted(path for path in root.glob(pattern) if path.is_file())
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise InputError(f"data folder {root}: has several split files ({names}); say which one with split_file")
        if found:
            return found[0]
    return None


def load_split_file(root: Path, split_file: Path, *, keep_underscores: bool = False) -> Dataset:
    """Read a data set whose splits are listed in a file.

    Args:
        root: The data set's folder. Paths in the file are relative to it or to one of its direct subfolders: the one
            that holds the first image of the file.
        split_file: The JSON file; "train" and "test" are required, "val" may be absent or empty.
        keep_underscores: Use class names as they are; otherwise underscores become spaces.

    Returns:
        The data set; every split has all class names, in the order of the labels.

    Raises:
        InputError: If the file is not JSON or has another structure, labels and class names do not match one to one,
            labels do not run from 0 to C-1, or images are absent.
    """
    splits = _read_entries(split_file)
    names = _class_names(split_file, splits, keep_underscores)
    folder = _image_folder(root, split_file, splits["train"][0][0])
    images = {}
    for split, entries in splits.items():
        paths = tuple(folder / path for path, _, _ in entries)
        images[split] = LabelledImages(paths, tuple(label for _, label, _ in entries), names)
    absent = [path for split in images.values() for path in split.paths if not path.is_file()]
    if absent:
        raise InputError(
            f"split file {split_file}: names {len(absent)} images that do not exist, the first is {absent[0]}"
        )
    return Dataset(root.resolve().name, images["train"], images.get("val"), images["test"])


def _read_entries(split_file: Path) -> dict[str, list[_Entry]]:
    try:
        content = json.loads(split_file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"split file {split_file}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise InputError(f"split file {split_file}: is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise InputError(f"split file {split_file}: expected an object with 'train' and 'test', got {_short(content)}")
    splits: dict[str, list[_Entry]] = {}
    for split in ("train", "val", "test"):
        entries = content.get(split)
        if split not in _REQUIRED and not entries:
            continue
        if not isinstance(entries, list) or not entries:
            raise InputError(
                f"split file {split_file}: expected {split!r} to be a list of [path, label, class name], "
                f"got {_short(entries)}"
            )
        splits[split] = [_entry(split_file, f"{split}[{i}]", entry) for i, entry in enumerate(entries)]
    return splits


def _entry(split_file: Path, where: str, entry: Any) -> _Entry:
    if isinstance(entry, list) and len(entry) == 3:
        path, label, name = entry
        # A JSON true would pass for the integer 1.
        if isinstance(path, str) and type(label) is int and isinstance(name, str) and path and name.strip():
            return path, label, name
    raise InputError(f"split file {split_file}, {where}: expected [path, label, class name], got {_short(entry)}")


def _class_names(split_file: Path, splits: dict[str, list[_Entry]], keep_underscores: bool) -> tuple[str, ...]:
    names: dict[int, str] = {}
    for split, entries in splits.items():
        for i, (_, label, name) in enumerate(entries):
            if names.setdefault(label, name) != name:
                raise InputError(
                    f"split file {split_file}, {split}[{i}]: label {label} is {name!r} here and {names[label]!r} before"
                )
    outside = sorted(label for label in names if not 0 <= label < len(names))
    if outside:
        raise InputError(
            f"split file {split_file}: label {outside[0]} is out of range: the file has {len(names)} classes, "
            f"so labels run from 0 to {len(names) - 1}"
        )
    return tuple(readable_name(names[label], keep_underscores) for label in range(len(names)))


def _image_folder(root: Path, split_file: Path, first: str) -> Path:
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))]
    for folder in folders:
        if (folder / first).is_file():
            return folder
    tried = ", ".join(str(folder) for folder in folders)
    raise InputError(f"split file {split_file}: its first image {first} is in none of the folders tried ({tried})")


def _short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

"""A data set folder with a split file in the format of CoOp: ``{"train": [[path, label, class name], ...], ...}``."""

from pathlib import Path, PurePath
from typing import Any

from fastprompt.data.images import Dataset, LabelledImages, readable_name
from fastprompt.documents import absolute_path, read_json, short
from fastprompt.errors import InputError, listed

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
            names = listed([path.name for path in found])
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
            labels do not run from 0 to C-1, a class name cannot be read, or images are absent or elsewhere.
    """
    splits = _read_entries(split_file)
    names = _class_names(split_file, splits, keep_underscores)
    folder = _image_folder(root, split_file, splits["train"][0][0])
    images = {}
    for split, entries in splits.items():
        paths = tuple(folder / path for path, _, _ in entries)
        images[split] = LabelledImages(paths, tuple(label for _, label, _ in entries), names)
    absent = [path for split in images.values() for path in split.paths if not _is_file(split_file, path)]
    if absent:
        raise InputError(
            f"split file {split_file}: names {len(absent)} images that do not exist, the first is {absent[0]}"
        )
    return Dataset(absolute_path(root).name, images["train"], images.get("val"), images["test"])


def _read_entries(split_file: Path) -> dict[str, list[_Entry]]:
    content = read_json(split_file, "split file")
    if not isinstance(content, dict):
        raise InputError(f"split file {split_file}: expected an object with 'train' and 'test', got {short(content)}")
    splits: dict[str, list[_Entry]] = {}
    for split in ("train", "val", "test"):
        entries = content.get(split)
        if split not in _REQUIRED and not entries:
            continue
        if not isinstance(entries, list) or not entries:
            raise InputError(
                f"split file {split_file}: expected {split!r} to be a list of [path, label, class name], "
                f"got {short(entries)}"
            )
        splits[split] = [_entry(split_file, f"{split}[{i}]", entry) for i, entry in enumerate(entries)]
    return splits


def _entry(split_file: Path, where: str, entry: Any) -> _Entry:
    # The type of a label is compared, as a JSON true would pass for the integer 1.
    kinds = [type(value) for value in entry] if isinstance(entry, list) else []
    if kinds != [str, int, str] or not entry[0] or not entry[2].strip():
        raise InputError(f"split file {split_file}, {where}: expected [path, label, class name], got {short(entry)}")
    path = PurePath(entry[0])
    if path.anchor or ".." in path.parts:
        raise InputError(
            f"split file {split_file}, {where}: expected a path within the data folder, got {short(entry[0])}"
        )
    return entry[0], entry[1], entry[2]


def _class_names(split_file: Path, splits: dict[str, list[_Entry]], keep_underscores: bool) -> tuple[str, ...]:
    names: dict[int, str] = {}
    for split, entries in splits.items():
        for i, (_, label, name) in enumerate(entries):
            if names.setdefault(label, name) != name:
                raise InputError(
                    f"split file {split_file}, {split}[{i}]: label {short(label)} is {short(name)} here and "
                    f"{short(names[label])} before"
                )
    outside = sorted(label for label in names if not 0 <= label < len(names))
    if outside:
        raise InputError(
            f"split file {split_file}: label {short(outside[0])} is out of range: the file has {len(names)} classes, "
            f"so labels run from 0 to {len(names) - 1}"
        )
    return tuple(
        readable_name(names[label], keep_underscores, f"split file {split_file}, label {label}")
        for label in range(len(names))
    )


def _image_folder(root: Path, split_file: Path, first: str) -> Path:
    folders = [root, *sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))]
    for folder in folders:
        if _is_file(split_file, folder / first):
            return folder
    raise InputError(
        f"image {first}: expected the first image of a split file in its folder or one below, got no such file in "
        f"{listed([folder.name for folder in folders])} (split file {split_file})"
    )


def _is_file(split_file: Path, path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:  # such as a name that is too long
        raise InputError(f"split file {split_file}: cannot look for {path} ({error.strerror})") from error

"""A folder of class folders, with or without a level of splits above them."""

import hashlib
import logging
import re
from pathlib import Path

from fastprompt.data.images import Dataset, LabelledImages, readable_name
from fastprompt.data.reading import IMAGE_SUFFIXES, find_images
from fastprompt.documents import absolute_path
from fastprompt.errors import InputError

HELD_OUT = 0.2
"""Share of each class that becomes the test split of a folder that has no split of its own."""

_log = logging.getLogger(__name__)

_Split = dict[str, tuple[Path, ...]]  # folder name of a class -> its images


def load_folder(root: Path, *, keep_underscores: bool = False) -> Dataset:
    """Read ``root/{train,val,test}/<class>/*`` or ``root/<class>/*``.

    With split folders, ``train`` is required, and ``test`` or ``val`` beside it; without ``test``, ``val`` is the test
    split (ImageNet's habit). Without split folders, a fifth of each class (at least one image) is held out as the test
    split: the images whose ``<class>/<file name>`` has the smallest SHA-256, so that the choice is the same on every
    machine and hardly changes when images are added. A warning counts what is left out: files with other endings than
    those of images, and folders in class folders. Another one tells where all names are ids of WordNet.

    Args:
        root: The folder.
        keep_underscores: Use folder names as they are; otherwise underscores become spaces.

    Returns:
        The data set; labels follow the sorted folder names.

    Raises:
        InputError: If there is no class folder, a class without an image, or a class that one of the splits lacks; if
            the name of a class folder cannot be read, or two read as one.
    """
    classes = root
    if _subfolders(root / "train"):
        classes = root / "train"
        splits = {name: _read_classes(root / name) for name in ("train", "val", "test") if (root / name).is_dir()}
        _check_same_classes(root, splits)
        if "test" not in splits:
            splits["test"] = splits.pop("val")
    else:
        for name in ("test", "val"):
            if _subfolders(root / name):
                raise InputError(f"data folder {root}: has {name}/ with class folders, but no train/ beside it")
        splits = _hold_out(root, _read_classes(root))
    names = [readable_name(name, keep_underscores, f"class folder {classes / name}") for name in splits["train"]]
    if all(re.fullmatch(r"n\d{8}", name) for name in names):
        _log.warning(
            'data folder %s: prompts will read "%s", as its class folders are named by ids of WordNet: a split file in '
            "it, or --split-file FILE, can name the classes",
            *(root, names[0]),
        )
    first_folder: dict[str, str] = {}
    for name, folder in zip(names, splits["train"], strict=True):
        if first_folder.setdefault(name, folder) != folder:
            raise InputError(
                f"data folder {root}: class folders {first_folder[name]!r} and {folder!r} give one class name, {name!r}"
            )
    images = {split: _label(classes, tuple(names)) for split, classes in splits.items()}
    return Dataset(absolute_path(root).name, images["train"], images.get("val"), images["test"])


def _subfolders(folder: Path) -> list[Path]:
    """Sorted subfolders that are not hidden; none if the folder does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _read_classes(folder: Path) -> _Split:
    folders = _subfolders(folder)
    classes = {path.name: find_images(path) for path in folders}
    _count_ignored(folder, folders, {path for paths in classes.values() for path in paths})
    if not classes:
        raise InputError(f"data folder {folder}: expected one subfolder a class, found no subfolder")
    for name, paths in classes.items():
        if not paths:
            raise InputError(
                f"class folder {folder / name}: expected image files directly in it ({' '.join(IMAGE_SUFFIXES)}), "
                "found none"
            )
    return classes


def _count_ignored(folder: Path, classes: list[Path], images: set[Path]) -> None:
    ignored = [
        path for one in classes for path in one.iterdir() if path not in images and not path.name.startswith(".")
    ]
    if ignored:
        _log.warning(
            "data folder %s: %d of %d entries of class folders are left out, as they are no files with the endings of "
            "images (%s); one of them is %s",
            *(folder, len(ignored), len(ignored) + len(images), " ".join(IMAGE_SUFFIXES), min(ignored)),
        )


def _check_same_classes(root: Path, splits: dict[str, _Split]) -> None:
    if len(splits) == 1:
        raise InputError(f"data folder {root}: has train/, but neither test/ nor val/ beside it")
    for split in splits:
        for name in sorted(splits["train"].keys() ^ splits[split].keys()):
            has, lacks = ("train", split) if name in splits["train"] else (split, "train")
            raise InputError(f"data folder {root}: class {name!r} is in {has}/ but not in {lacks}/")


def _hold_out(root: Path, classes: _Split) -> dict[str, _Split]:
    train, test = {}, {}
    for name, paths in classes.items():
        if len(paths) < 2:
            raise InputError(
                f"class folder {root / name}: expected at least 2 images, one to train on and one to hold out for "
                "the test, got 1"
            )
        by_hash = sorted(paths, key=lambda path: hashlib.sha256(f"{path.parent.name}/{path.name}".encode()).digest())
        held_out = max(1, round(HELD_OUT * len(paths)))
        test[name], train[name] = tuple(sorted(by_hash[:held_out])), tuple(sorted(by_hash[held_out:]))
    return {"train": train, "test": test}


def _label(classes: _Split, names: tuple[str, ...]) -> LabelledImages:
    paths = tuple(path for group in classes.values() for path in group)
    labels = tuple(label for label, group in enumerate(classes.values()) for _ in group)
    return LabelledImages(paths, labels, names)

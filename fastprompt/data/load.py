"""One entrance to every kind of data set."""

from pathlib import Path

from fastprompt.data.folder import load_folder
from fastprompt.data.images import Dataset
from fastprompt.data.split_file import find_split_file, load_split_file
from fastprompt.documents import home_path
from fastprompt.errors import InputError


def load_dataset(root: str | Path, *, split_file: str | Path | None = None, keep_underscores: bool = False) -> Dataset:
    """Read a data set from a folder: by its split file if it has one, else as a folder of class folders.

    Args:
        root: Holds a CoOp split file and the images, or ``train``, ``val`` and ``test`` with class folders in them, or
            class folders alone (then a fifth of each class is held out as the test split).
        split_file: A split file elsewhere, or the one to use if the folder has several.
        keep_underscores: Use class names as written (GalLoP's code does); otherwise underscores become spaces.

    Raises:
        InputError: If the folder is missing, or its contents are not as above; the sentence names what is wrong.
    """
    root = home_path(root)
    if not root.is_dir():
        raise InputError(f"data folder {root}: no such folder")
    split_file = home_path(split_file) if split_file is not None else find_split_file(root)
    if split_file is not None:
        return load_split_file(root, split_file, keep_underscores=keep_underscores)
    return load_folder(root, keep_underscores=keep_underscores)

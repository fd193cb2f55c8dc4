"""What a data set is here: paths, labels and class names, checked once when they are put together."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path

from fastprompt.documents import short
from fastprompt.errors import InputError

_NO_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # control characters, and bytes that are not UTF-8


@dataclass(frozen=True)
class LabelledImages:
    """One split: images and the class of each.

    Attributes:
        paths: One file an image.
        labels: One label an image; labels index ``class_names``.
        class_names: The C names that the text encoder will read. Names may repeat (ImageNet has two such pairs).

    Raises:
        InputError: If there is no image, no class, not one label an image, a label that is no whole number from 0 to
            C-1, or a class name that is empty or no text.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.paths:
            raise InputError("labelled images: expected at least one image, got none")
        if len(self.paths) != len(self.labels):
            raise InputError(
                f"labelled images: expected one label an image, got {len(self.labels)} labels for "
                f"{len(self.paths)} images"
            )
        if isinstance(self.class_names, str) or not self.class_names:
            raise InputError(f"labelled images: expected a sequence of class names, got {short(self.class_names)}")
        for name in self.class_names:
            check_class_name(name, "labelled images")
        for path, label in zip(self.paths, self.labels, strict=True):
            if not isinstance(label, Integral) or isinstance(label, bool):
                raise InputError(f"{path}: expected a whole number as the label, got {short(label)}")
            if not 0 <= label < len(self.class_names):
                raise InputError(
                    f"{path}: label {short(label)} is out of range: with {len(self.class_names)} classes, "
                    f"labels run from 0 to {len(self.class_names) - 1}"
                )

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, indices: Iterable[int]) -> "LabelledImages":
        """Return the images at ``indices``, in that order, with the same class names."""
        chosen = list(indices)
        paths = tuple(self.paths[i] for i in chosen)
        return LabelledImages(paths, tuple(self.labels[i] for i in chosen), self.class_names)


@dataclass(frozen=True)
class Dataset:
    """The splits of one data set; all of them have the same class names.

    Attributes:
        name: How reports call it.
        train: Images to learn from; few-shot samplers draw from these.
        val: Images to choose settings with, or None.
        test: Images that results are reported on.

    Raises:
        InputError: If the class names of two splits differ.
    """

    name: str
    train: LabelledImages
    val: LabelledImages | None
    test: LabelledImages

    def __post_init__(self) -> None:
        for split, images in (("val", self.val), ("test", self.test)):
            if images is not None and images.class_names != self.train.class_names:
                raise InputError(f"data set {self.name}: train and {split} have different class names")


def readable_name(name: str, keep_underscores: bool, where: str) -> str:
    """Return a class name as the text encoder should read it: underscores become spaces, as in the CoOp family.

    Args:
        name: As written.
        keep_underscores: Return it as it is.
        where: How messages call its place, such as "class folder photos/cat".

    Raises:
        InputError: If nothing but spaces would be left, or it has control characters or bytes that are no text.
    """
    readable = name if keep_underscores else name.replace("_", " ").strip()
    if not readable.strip():
        raise InputError(f"{where}: expected a class name, got {short(name)}, of which nothing is left to read")
    check_class_name(readable, where)
    return readable


def check_class_name(name: str, where: str) -> None:
    """Raise ``InputError`` unless ``name`` is text, not empty, of printable characters."""
    if not isinstance(name, str) or not name.strip():
        raise InputError(f"{where}: expected class names that are not empty, got {short(name)}")
    if _NO_TEXT.search(name):
        raise InputError(f"{where}: expected a class name of printable characters, got {short(name)}")

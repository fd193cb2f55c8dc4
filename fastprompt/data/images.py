"""What a data set is here: paths, labels and class names, checked once when they are put together."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fastprompt.errors import InputError


@dataclass(frozen=True)
class LabelledImages:
    """One split: images and the class of each.

    Attributes:
        paths: One file an image.
        labels: One label an image; labels index ``class_names``.
        class_names: The C names that the text encoder will read. Names may repeat (ImageNet has two such pairs).

    Raises:
        InputError: If there is no image, no class, a label outside 0 .. C-1, or not one label an image.
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
        if not self.class_names or not all(name.strip() for name in self.class_names):
            raise InputError(f"labelled images: expected class names that are not empty, got {self.class_names!r}")
        for path, label in zip(self.paths, self.labels, strict=True):
            if not 0 <= label < len(self.class_names):
                raise InputError(
                    f"{path}: label {label} is out of range: with {len(self.class_names)} classes, "
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


def readable_name(name: str, keep_underscores: bool) -> str:
    """Return a class name as the text encoder should read it: underscores become spaces, as in the CoOp family."""
    return name if keep_underscores else name.replace("_", " ").strip()

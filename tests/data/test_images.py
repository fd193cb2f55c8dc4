from pathlib import Path

import pytest

from fastprompt.data import Dataset, LabelledImages
from fastprompt.errors import InputError

A, B = Path("a.png"), Path("b.png")


@pytest.mark.parametrize(
    ("paths", "labels", "names", "sentence"),
    [
        ((), (), ("cat",), "expected at least one image, got none"),
        ((A, B), (0,), ("cat",), "expected one label an image, got 1 labels for 2 images"),
        ((A,), (0,), (), r"expected a sequence of class names, got \(\)$"),
        ((A,), (0,), "cat", "expected a sequence of class names, got 'cat'"),
        ((A,), (0,), ("cat", " "), "expected class names that are not empty, got ' '"),
        ((A,), (0,), ("cat", 5), "expected class names that are not empty, got 5"),
        ((A,), (0,), ("cat", "d\0o\0g\0"), "expected a class name of printable characters, got 'd.x00o"),
        ((A,), (0,), ("caf\udce9",), "expected a class name of printable characters, got 'caf.udce9'"),
        ((A,), ("0",), ("cat",), "^a.png: expected a whole number as the label, got '0'$"),
        ((A,), (True,), ("cat", "dog"), "^a.png: expected a whole number as the label, got True$"),
        ((A,), (0.0,), ("cat",), "^a.png: expected a whole number as the label, got 0.0$"),
        ((A,), (10**100,), ("cat",), r"^a.png: label 1000\d*\.\.\.0* is out of range: with 1 classes"),
        ((A, B), (0, 2), ("cat", "dog"), r"^b.png: label 2 is out of range: with 2 classes, labels run from 0 to 1$"),
        ((A, B), (-1, 0), ("cat", "dog"), r"^a.png: label -1 is out of range"),
    ],
)
def test_bad_labelled_images(paths, labels, names, sentence):
    with pytest.raises(InputError, match=sentence):
        LabelledImages(paths, labels, names)


def test_splits_must_share_class_names():
    cats, dogs = LabelledImages((A,), (0,), ("cat",)), LabelledImages((B,), (0,), ("dog",))
    with pytest.raises(InputError, match="data set pets: train and test have different class names"):
        Dataset("pets", cats, None, dogs)
    with pytest.raises(InputError, match="data set pets: train and val have different class names"):
        Dataset("pets", cats, dogs, cats)


def test_subset_keeps_order_and_class_names():
    images = LabelledImages((A, B), (0, 1), ("cat", "dog"))
    assert images.subset([1, 0, 1]) == LabelledImages((B, A, B), (1, 0, 1), ("cat", "dog"))

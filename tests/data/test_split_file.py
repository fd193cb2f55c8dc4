import json
import re

import pytest

from fastprompt.data import load_dataset
from fastprompt.errors import InputError
from tests.data.images_on_disk import write_image

SPLITS = {
    "train": [["sea_lion/a.png", 1, "sea_lion"], ["cat/a.png", 0, "cat"]],
    "val": [["cat/b.png", 0, "cat"]],
    "test": [["sea_lion/b.png", 1, "sea_lion"]],
}


@pytest.fixture
def root(tmp_path):
    for name in ("sea_lion/a", "sea_lion/b", "cat/a", "cat/b"):
        write_image(tmp_path / "photos" / f"{name}.png")
    (tmp_path / "annotations").mkdir()
    return tmp_path


def write(root, content, name="split_zhou_Pets.json"):
    (root / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def test_reads_every_split_with_all_class_names(root):
    data = load_dataset(write(root, SPLITS))
    assert data.train.paths == (root / "photos/sea_lion/a.png", root / "photos/cat/a.png")
    assert data.train.labels == (1, 0)
    assert data.val.labels == (0,)
    assert data.test.paths == (root / "photos/sea_lion/b.png",)
    assert data.train.class_names == data.val.class_names == data.test.class_names == ("cat", "sea lion")


@pytest.mark.parametrize("val", [{}, {"val": []}, {"val": None}])
def test_val_is_optional(root, val):
    data = load_dataset(write(root, {"train": SPLITS["train"], "test": SPLITS["test"]} | val), keep_underscores=True)
    assert data.val is None
    assert data.test.class_names == ("cat", "sea_lion")


def test_paths_may_be_relative_to_the_data_folder_itself(root):
    assert load_dataset(write(root / "photos", SPLITS)).train.paths[0] == root / "photos/sea_lion/a.png"


def test_coops_file_wins_and_an_explicit_one_over_both(root):
    write(root, SPLITS)
    write(root, SPLITS | {"test": SPLITS["val"]}, "split_mine.json")
    assert load_dataset(root).test.labels == (1,)
    assert load_dataset(root, split_file=root / "split_mine.json").test.labels == (0,)


def test_any_split_json_is_found(root):
    assert load_dataset(write(root, SPLITS, "splits.json")).test.labels == (1,)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_are_told_by_their_marks(root, encoding):
    splits = json.dumps({split: [[p, y, f"{n} é"] for p, y, n in some] for split, some in SPLITS.items()})
    (root / "split_zhou_Pets.json").write_text(splits, encoding=encoding)
    assert load_dataset(root).train.class_names == ("cat é", "sea lion é")


def test_a_file_in_latin_1_is_refused_at_its_byte(root):
    (root / "split_zhou_Pets.json").write_bytes('{"train": [["é.png"'.encode("latin-1"))
    with pytest.raises(InputError, match=r"split_zhou_Pets.json: expected text in UTF-8, got byte 13 that is not"):
        load_dataset(root)


def test_two_labels_may_have_one_name(root):
    """As in ImageNet, whose missile and sunglasses come twice."""
    splits = {"train": [["cat/a.png", 0, "cat"], ["cat/b.png", 1, "cat"]], "test": [["sea_lion/b.png", 1, "cat"]]}
    assert load_dataset(write(root, splits)).train.class_names == ("cat", "cat")


def test_several_split_files_are_not_guessed_between(root):
    write(root, SPLITS, "split_a.json")
    write(root, SPLITS, "split_b.json")
    with pytest.raises(InputError, match=r"several split files \(split_a.json, split_b.json\); say which one"):
        load_dataset(root)


def test_missing_split_file(root):
    with pytest.raises(InputError, match=r"split file none.json: expected a file, got no such file"):
        load_dataset(root, split_file="none.json")


CAT = ["cat/a.png", 0, "cat"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('{"train": [', "split file {file}: expected JSON, got something else"),
        ([1, 2], "split file {file}: expected an object with 'train' and 'test', got [1, 2]"),
        ({"train": [CAT]}, "expected 'test' to be a list of [path, label, class name], got nothing"),
        ({"train": [], "test": [CAT]}, "expected 'train' to be a list of [path, label, class name], got []"),
        ({"train": {"cat": 1}, "test": [CAT]}, "expected 'train' to be a list"),
        ({"train": [CAT, ["cat/a.png", 0]], "test": [CAT]}, "{file}, train[1]: expected [path, label, class name]"),
        ({"train": [CAT], "test": [["cat/a.png", "0", "cat"]]}, "{file}, test[0]: expected [path, label, class name]"),
        ({"train": [CAT], "val": [["cat/a.png", True, "cat"]], "test": [CAT]}, "{file}, val[0]: expected [path"),
        ({"train": [CAT], "test": [["cat/a.png", 0, " "]]}, "{file}, test[0]: expected [path, label, class name]"),
        (
            {"train": [CAT], "test": [["cat/a.png", 0, "dog"]]},
            "{file}, test[0]: label 0 is 'dog' here and 'cat' before",
        ),
        (
            {"train": [CAT], "test": [["cat/a.png", 10**40, "dog"]]},
            "{file}: label 100000000000000000...0000000000000000000 is out of range: the file has 2 classes",
        ),
        ({"train": [CAT], "test": [["cat/a.png", 0.0, "cat"]]}, "got ['cat/a.png', 0.0, 'cat']"),
        ({"train": [CAT], "test": [["cat/a.png", float("nan"), "cat"]]}, "got ['cat/a.png', nan, 'cat']"),
        ({"train": [CAT], "test": [[["cat/a.png"], 0, "cat"]]}, "got [['cat/a.png'], 0, 'cat']"),
        ({"train": [CAT], "test": [{"path": "cat/a.png"}]}, "{file}, test[0]: expected [path, label, class name]"),
        ({"train": [CAT], "test": [["cat/a.png", 0, "_"]]}, "test[0]: label 0 is '_' here and 'cat' before"),
        ({"train": [["cat/a.png", 0, "_"]], "test": [["cat/a.png", 0, "_"]]}, "{file}, label 0: expected a class name"),
        (
            {"train": [["cat/a.png", 0, "a\0b"]], "test": [["cat/a.png", 0, "a\0b"]]},
            "label 0: expected a class name of",
        ),
        (
            {"train": [CAT], "test": [["/etc/passwd", 0, "cat"]]},
            "expected a path within the data folder, got '/",
        ),
        ({"train": [["../x.png", 0, "cat"]], "test": [CAT]}, "train[0]: expected a path within the data folder"),
        ({"train": [CAT], "test": [["cat/../../x.png", 0, "cat"]]}, "expected a path within the data folder"),
        ({"train": [CAT], "test": [["cat/\0.png", 0, "cat"]]}, "names 1 images that do not exist"),
        (
            {"train": [["c\0at.png", 0, "cat"]], "test": [CAT]},
            "image c\0at.png: expected the first image of a split file in its folder",
        ),
        ({"train": [CAT], "test": [["x" * 300, 0, "cat"]]}, "(File name too long)"),
        (
            {"train": [CAT], "test": [["cat", 0, "cat"]]},
            "names 1 images that do not exist, the first is {root}/photos/cat",
        ),
        (
            {"train": [CAT], "test": [["cat/a.png", 2, "dog"]]},
            "{file}: label 2 is out of range: the file has 2 classes, so labels run from 0 to 1",
        ),
        ({"train": [["cat/a.png", -1, "cat"]], "test": [["cat/a.png", 0, "dog"]]}, "label -1 is out of range"),
        (
            {"train": [["lost/a.png", 0, "cat"]], "test": [CAT]},
            "image lost/a.png: expected the first image of a split file in its folder or one below, got no such file "
            "in {folder}, annotations, photos",
        ),
        (
            {"train": [CAT], "test": [["cat/x.png", 0, "cat"], CAT, ["cat/y.png", 0, "cat"]]},
            "{file}: names 2 images that do not exist, the first is {root}/photos/cat/x.png",
        ),
    ],
)
def test_bad_split_files_get_one_sentence(root, content, sentence):
    write(root, content)
    places = {"{file}": root / "split_zhou_Pets.json", "{root}": root, "{folder}": root.name}
    for place, path in places.items():
        sentence = sentence.replace(place, str(path))
    with pytest.raises(InputError, match=re.escape(sentence)) as caught:
        load_dataset(root)
    assert "\n" not in str(caught.value)

import os
import re

import pytest

from fastprompt.data import load_dataset
from fastprompt.data.reading import IMAGE_SUFFIXES
from fastprompt.errors import InputError
from tests.data.images_on_disk import write_image


def relative(images, root):
    return [path.relative_to(root).as_posix() for path in images.paths]


def test_splits_are_read_in_sorted_class_order(class_folders):
    root = class_folders({"train/sea_lion": 2, "train/Cat": 1, "test/sea_lion": 1, "test/Cat": 1, "val/Cat": 1})
    write_image(root / "val/sea_lion/x.JPG")
    (root / "train/Cat/.hidden.png").write_bytes(b"not an image")
    (root / "train/Cat/notes.txt").write_text("not an image")
    (root / "train/.git").mkdir()
    data = load_dataset(root)
    assert data.name == "pets"
    assert data.train.class_names == data.val.class_names == data.test.class_names == ("Cat", "sea lion")
    assert relative(data.train, root) == ["train/Cat/000.png", "train/sea_lion/000.png", "train/sea_lion/001.png"]
    assert data.train.labels == (0, 1, 1)
    assert relative(data.val, root) == ["val/Cat/000.png", "val/sea_lion/x.JPG"]
    assert relative(data.test, root) == ["test/Cat/000.png", "test/sea_lion/000.png"]


def test_underscores_can_be_kept(class_folders):
    root = class_folders({"sea_lion": 2})
    assert load_dataset(root, keep_underscores=True).train.class_names == ("sea_lion",)


def test_without_test_val_is_the_test_split(class_folders):
    root = class_folders({"train/cat": 1, "val/cat": 2})
    data = load_dataset(root)
    assert data.val is None
    assert relative(data.test, root) == ["val/cat/000.png", "val/cat/001.png"]


def test_a_fifth_of_each_class_is_held_out_and_stays_so(class_folders):
    root = class_folders({"cat": 10, "dog": 2})
    data = load_dataset(root)
    assert data.val is None
    assert [data.train.labels.count(label) for label in (0, 1)] == [8, 1]
    assert [data.test.labels.count(label) for label in (0, 1)] == [2, 1]
    assert sorted(data.train.paths + data.test.paths) == sorted(root.glob("*/*.png"))
    # Written down, so that a release that changes who is held out is noticed.
    assert relative(data.test, root) == ["cat/000.png", "cat/008.png", "dog/001.png"]
    class_folders({"ape": 3})  # another class changes the labels, not the images held out
    assert set(data.test.paths) < set(load_dataset(root).test.paths)


def test_a_folder_named_by_an_underscore_is_a_class_where_underscores_are_kept(class_folders):
    assert load_dataset(class_folders({"_": 2, "a": 2}), keep_underscores=True).train.class_names == ("_", "a")


def test_a_class_called_train_is_a_class(class_folders):
    assert load_dataset(class_folders({"train": 2, "car": 2})).train.class_names == ("car", "train")


def test_what_is_left_out_of_class_folders_is_counted_in_one_line(class_folders, caplog):
    root = class_folders({"cat": 2, "dog": 3})
    load_dataset(root)
    assert not caplog.records
    for name in ("dog/notes.txt", "dog/raw.nef", "cat/.hidden"):
        (root / name).write_text("no image")
    os.mkfifo(root / "cat/pipe.png")
    (root / "cat/more").mkdir()
    load_dataset(root)
    assert [record.getMessage() for record in caplog.records] == [
        f"data folder {root}: 4 of 9 entries of class folders are left out, as they are no files with the endings of "
        f"images ({' '.join(IMAGE_SUFFIXES)}); one of them is {root}/cat/more"
    ]


def test_ids_of_wordnet_are_said_once_where_all_names_are_such(class_folders, caplog):
    load_dataset(class_folders({"n01440764": 2, "n02": 2, "n014407641": 2}, "mixed"))
    load_dataset(class_folders({"n01440764": 2, "mn01440764": 2}, "names"))
    assert not caplog.records
    load_dataset(root := class_folders({"n01440764": 2, "n01443537": 2}))
    assert [record.getMessage() for record in caplog.records] == [
        f'data folder {root}: prompts will read "n01440764", as its class folders are named by ids of WordNet: a split '
        "file in it, or --split-file FILE, can name the classes"
    ]


def test_missing_folder(tmp_path):
    with pytest.raises(InputError, match=r"^data folder .*nowhere: no such folder$"):
        load_dataset(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ({}, "data folder {root}: expected one subfolder a class, found no subfolder"),
        ({"cat": 2, "dog": 0}, "class folder {root}/dog: expected image files directly in it"),
        ({"cat": 2, "dog": 1}, "class folder {root}/dog: expected at least 2 images"),
        ({"sea_lion": 2, "sea lion": 2}, "'sea lion' and 'sea_lion' give one class name, 'sea lion'"),
        ({"cat": 2, "_": 2}, "class folder {root}/_: expected a class name, got '_', of which nothing is left to read"),
        ({"train/_": 2, "test/_": 2}, "class folder {root}/train/_: expected a class name, got '_'"),
        ({"c\tat": 2}, "class folder {root}/c\tat: expected a class name of printable characters, got 'c\\tat'"),
        ({"train/cat": 1}, "data folder {root}: has train/, but neither test/ nor val/ beside it"),
        ({"test/cat": 1, "cat": 2}, "data folder {root}: has test/ with class folders, but no train/ beside it"),
        ({"train/cat": 1, "test/cat": 1, "test/dog": 1}, "class 'dog' is in test/ but not in train/"),
        ({"train/cat": 1, "train/ape": 1, "test/cat": 1}, "class 'ape' is in train/ but not in test/"),
        ({"train/cat": 1, "test/cat": 1, "val/cat": 0}, "class folder {root}/val/cat: expected image files"),
    ],
)
def test_bad_folders_get_one_sentence(class_folders, counts, sentence):
    root = class_folders(counts)
    with pytest.raises(InputError, match=re.escape(sentence.format(root=root))) as caught:
        load_dataset(root)
    assert "\n" not in str(caught.value)

"""Text, JSON and typed values as they are read from files, and what is said about those that are something else."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pytest

from fastprompt.documents import build, check_type, home_path, parse_json, read_json, read_text
from fastprompt.errors import InputError, listed, sentence


@dataclass
class Settings:
    name: str
    rates: Sequence[float]
    epochs: int | Mapping[int, int] = 3


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_read_without_its_byte_order_mark(encoding, tmp_path):
    file = tmp_path / "names.txt"
    file.write_bytes("Müsli\n猫\n".encode(encoding))
    assert read_text(file, "class names") == "Müsli\n猫\n"


def test_files_that_are_no_text_are_refused_and_a_pipe_is_not_waited_for(tmp_path):
    (tmp_path / "latin").write_bytes("Müsli".encode("latin-1"))
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("latin", "expected text in UTF-8"), ("pipe", "got something else"), ("no", "no such file")):
        with pytest.raises(InputError, match=f"class names .*{name}: .*{words}"):
            read_text(tmp_path / name, "class names")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected JSON"),
        ("{'a': 1}", "expected JSON"),
        ("[" * 99_999, "more than 100 levels"),
        ("[" * 101 + "]" * 101, "more than 100 levels"),
        ('{"a": 1, "b": 2, "a": 3}', "an object names 'a' twice"),
        ("1" * 5000, "expected JSON"),
    ],
)
def test_what_is_not_plain_json_is_refused(text, words, tmp_path):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(InputError, match=words):
        read_json(tmp_path / "f.json", "recipe")
    assert parse_json("[" * 100 + "]" * 100, "here") is not None


def test_a_dataclass_is_built_from_values_of_its_types_alone():
    assert build(Settings, {"name": "a", "rates": [1, 0.5]}, "f") == Settings("a", [1, 0.5])
    assert build(Settings, {"name": "a", "rates": [], "epochs": {1: 2}}, "f").epochs == {1: 2}
    for change, words in (
        ({"name": None}, "f: name: expected str, got nothing"),
        ({"rates": [1, "x"]}, r"f: rates: expected Sequence\[float\], got \[1, 'x'\]"),
        ({"epochs": True}, r"f: epochs: expected int \| .*, got True"),
        ({"epochs": {"x": 1}}, "f: epochs: expected"),
        ({"other": 1}, "f: expected no value 'other'"),
    ):
        with pytest.raises(InputError, match=words):
            build(Settings, {"name": "a", "rates": []} | change, "f")
    with pytest.raises(InputError, match="f: expected a value 'rates', got none"):
        build(Settings, {"name": "a"}, "f")
    with pytest.raises(InputError, match=r"f: expected a JSON object, got \[1\]"):
        build(Settings, [1], "f")


def test_truth_values_are_no_numbers():
    check_type(True, bool | None, "flag")
    with pytest.raises(InputError, match="shots: expected int, got True"):
        check_type(True, int, "shots")


def test_an_unknown_user_has_no_home():
    with pytest.raises(InputError, match="path ~nobody-here/x: expected the name of a user behind ~, got ~nobody-here"):
        home_path("~nobody-here/x")


def test_a_sentence_is_one_printable_line_that_keeps_both_ends():
    said = sentence(InputError("file \x1b[2J\n  of \udcff\u2028: " + "x" * 10**6 + " is too long"))
    assert len(said) == 300 - 1
    assert said.startswith(r"file \x1b[2J of \udcff")
    assert said.endswith("x is too long")
    assert said.isprintable()
    assert sentence(FileNotFoundError(2, "No such file or directory", "a\nb")) == "a b: No such file or directory"


def test_long_lists_are_cut():
    assert listed(range(3)) == "0, 1, 2"
    assert listed(range(40), most=3) == "0, 1, 2 ... and 37 more"
    assert json.dumps(listed([])) == '"none"'

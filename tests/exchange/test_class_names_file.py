"""Files of class names for `import`: encodings, blank lines, and names that cannot be read."""

import codecs
import re
from pathlib import Path

import pytest

from fastprompt.errors import InputError
from fastprompt.exchange.config import ImportConfig
from fastprompt.exchange.import_run import _class_names

NAMES = "dark_blue\n\n  \ncafé au_lait \n"


def read(path, content, keep=False):
    path.write_bytes(content)
    return _class_names(ImportConfig(file=Path("c"), class_names=path, out=Path("run")), keep)


@pytest.mark.parametrize(
    "content",
    [
        NAMES.encode(),
        codecs.BOM_UTF8 + NAMES.encode(),
        NAMES.encode("utf-16"),
        codecs.BOM_UTF16_BE + NAMES.encode("utf-16-be"),
        NAMES.replace("\n", "\r\n").encode(),
    ],
)
def test_encodings_are_told_by_their_marks(tmp_path, content):
    assert read(tmp_path / "names.txt", content) == ("dark blue", "café au lait")
    assert read(tmp_path / "names.txt", content, keep=True) == ("dark_blue", "café au_lait ")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (NAMES.encode("latin-1"), "names.txt: expected text in UTF-8, got byte 17 that is not"),
        ("dark\ncat\n".encode("utf-16-le"), "names.txt, line 1: expected a class name of printable characters, got 'd"),
        (NAMES.encode("utf-32"), "names.txt, line 1: expected a class name of printable characters"),
        (b"cat\n_\ndog\n", "names.txt, line 2: expected a class name, got '_', of which nothing is left to read"),
    ],
)
def test_what_is_no_name_is_refused_where_it_stands(tmp_path, content, sentence):
    with pytest.raises(InputError, match=re.escape(sentence)):
        read(tmp_path / "names.txt", content)


def test_a_missing_file_is_named(tmp_path):
    config = ImportConfig(file=Path("c"), class_names=tmp_path / "none.txt", out=Path("run"))
    with pytest.raises(InputError, match=r"^class names .*none.txt: expected a file, got no such file$"):
        _class_names(config, False)

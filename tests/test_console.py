"""What the command line prints when something is wrong."""

import io
import logging
import os
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fastprompt import cli
from fastprompt.errors import InputError


@pytest.fixture
def doing(monkeypatch):
    """Replaces what commands do."""

    def replace(action):
        monkeypatch.setattr(cli, "run", lambda command: action())

    return replace


def fail(error):
    raise error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InputError("shots: expected\nless"), "shots: expected less"),
        (OSError(28, "No space left on device", "model"), "model: No space left on device"),
        (MemoryError("8 GB"), "not enough memory: 8 GB"),
    ],
)
def test_an_error_that_is_no_fault_of_ours_is_one_line(error, said, doing, capsys):
    doing(lambda: fail(error))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == f"fastprompt: error: {said}\n"


def test_memory_that_torch_does_not_get_is_one_line_and_other_errors_stay(doing, capsys):
    doing(lambda: torch.empty(2**60, dtype=torch.uint8))
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err.startswith("fastprompt: error: not enough memory: ")
    doing(lambda: fail(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["doctor"])


@pytest.mark.parametrize("error", [None, InputError("wrong")])
def test_others_warn_at_the_end_and_not_at_all_beside_an_error(error, doing, capsys):
    def action():
        warnings.warn("theirs by warnings", stacklevel=1)
        logging.warning("theirs by logging")
        logging.getLogger("fastprompt.data").warning("ours")
        if error:
            raise error
        print("done", file=sys.stderr)

    doing(action)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["doctor"]) == (2 if error else 0)
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == ["fastprompt.data: ours", "fastprompt: error: wrong" if error else "done"]
    assert [word in "".join(said[2:]) for word in ("by warnings", "by logging")] == 2 * [error is None]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "Unrecognized options: trian; For full helptext, run fastprompt --help"),
        (["recipes", "ls", "--x"], "Unrecognized options: --x; "),
        (["predict"], "Missing from fastprompt predict: RUN Run folder that train wrote. (required); "),
        (["words", "run", "--top", "nan"], "Error parsing --top: invalid literal for int() with base 10: 'nan'; "),
    ],
)
def test_arguments_that_tyro_refuses_are_one_line(arguments, said, capsys):
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"fastprompt: error: {said}")
    assert printed.count("\n") == 1


def test_warnings_of_ours_and_interruptions_are_one_line_without_control_characters(doing, capsys):
    def action():
        logging.getLogger("fastprompt.files").warning("%s: waiting", "a\x1b[2J\nb")
        raise KeyboardInterrupt("runs/a\x1b[2J\nb holds this state")

    doing(action)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err.splitlines() == [
        r"fastprompt.files: a\x1b[2J b: waiting",
        r"fastprompt: runs/a\x1b[2J b holds this state",
    ]


def test_output_that_its_encoding_lacks_is_escaped(doing, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    doing(lambda: print("Müsli \udcff"))
    assert cli.main(["doctor"]) == 0
    assert sys.stdout.buffer.getvalue() == rb"M\xfcsli \udcff" + b"\n"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_behind_standard_output_is_one_line():
    command = f"{sys.executable} -m fastprompt.cli recipes ls > /dev/full"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "fastprompt: error: No space left on device\n"


@pytest.mark.parametrize(("number", "status", "said"), [(2, 130, "interrupted"), (15, 143, "terminated")])
def test_signals_end_a_command_with_a_sentence_and_their_status(number, status, said, doing, capsys):
    before = [signal.signal(signal.SIGINT, signal.default_int_handler), signal.getsignal(signal.SIGTERM)]
    doing(lambda: os.kill(os.getpid(), number))
    assert cli.main(["doctor"]) == status
    assert capsys.readouterr().err == f"fastprompt: {said}\n"
    signal.signal(signal.SIGINT, before[0])
    assert signal.getsignal(signal.SIGTERM) is before[1]


def test_a_command_runs_outside_of_the_main_thread(doing, capsys):
    doing(lambda: print("done"))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(cli.main, ["doctor"]).result() == 0
    assert capsys.readouterr().out == "done\n"

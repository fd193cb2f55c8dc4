"""Files appear whole or not at all, and folders are written by one process at a time."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from fastprompt import files
from fastprompt.errors import InputError
from fastprompt.files import locked, replacing, sweep, write_file, write_tensors

# Holds the folder's lock until its standard input ends.
HOLD = "import sys; from pathlib import Path; from fastprompt.files import locked\n" + (
    "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
)


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def other(tmp_path):
    """Starts a process that holds tmp_path / "run"."""
    started = []

    def start():
        command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def small_files():
    """A limit of 4,096 bytes a file stands for a full disk: the system refuses the rest of a write."""
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    signal.signal(signal.SIGXFSZ, previous)


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path):
    write_file(tmp_path / "a.txt", "old")
    write_file(tmp_path / "a.txt", "nëw")
    assert (tmp_path / "a.txt").read_bytes() == "nëw".encode()
    assert names(tmp_path) == ["a.txt"]


def test_bytes_are_on_the_disk_before_the_name_and_the_name_after_it(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor):
        opened = Path(f"/proc/self/fd/{descriptor}").resolve()
        done.append(("sync", "folder" if opened == tmp_path else opened.read_text()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", lambda self, to: (done.append("rename"), replace(self, to)))
    write_file(tmp_path / "a.txt", "content")
    assert done == [("sync", "content"), "rename", ("sync", "folder")]


def test_tensors_come_back_with_their_metadata(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor([1, 2], requires_grad=False)}
    write_tensors(tmp_path / "t.safetensors", tensors, {"who": "me"})
    back = load_file(tmp_path / "t.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert names(tmp_path) == ["t.safetensors"]


def test_the_same_tensors_and_strings_give_the_same_bytes(tmp_path):
    metadata = {name: name.upper() for name in "abcdefgh"}
    for name in "xy":
        write_tensors(tmp_path / name, {"t": torch.ones(3), "u": torch.zeros(2, dtype=torch.int64)}, metadata)
        metadata = dict(reversed(metadata.items()))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    with safe_open(tmp_path / "x", "pt") as file:
        assert file.metadata() == metadata and torch.equal(file.get_tensor("t"), torch.ones(3))


@pytest.mark.parametrize("write", [
    lambda file: write_file(file, bytes(10_000)),
    lambda file: write_tensors(file, {"a": torch.zeros(10_000)}),
])  # fmt: skip
def test_a_full_disk_is_one_sentence_and_keeps_the_old_file(tmp_path, small_files, write):
    write_file(tmp_path / "a", "old")
    with pytest.raises(InputError, match=r"a: cannot be written \(File too large\)$"):
        write(tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


def test_a_block_that_raises_keeps_the_old_file(tmp_path):
    write_file(tmp_path / "a", "old")
    with pytest.raises(KeyError), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise KeyError
    assert (tmp_path / "a").read_text() == "old" and names(tmp_path) == ["a"]


def test_no_folder_to_write_into_is_said(tmp_path):
    with pytest.raises(InputError, match=r"a: cannot be written \(No such file or directory\)"):
        write_file(tmp_path / "none" / "a", "x")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"run: cannot be written \(Not a directory\)"), locked(tmp_path / "file/run"):
        pass


def test_a_lock_leaves_what_was_written_and_no_folder_without_content(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert names(tmp_path) == ["a", "a/b", f"a/b/{files.LOCK}"]
    assert names(tmp_path) == []
    with locked(tmp_path / "a" / "b"):
        write_file(tmp_path / "a" / "c", "x")
    assert names(tmp_path) == ["a", "a/c"]
    (tmp_path / "empty").mkdir()
    with locked(tmp_path / "empty"):
        pass
    assert (tmp_path / "empty").is_dir()  # not ours


def test_the_holder_is_named(tmp_path, other):
    process = other()
    sentence = rf"run: expected no other process to write here, but process {process.pid} on \S+ since 20\S+ does: "
    with pytest.raises(InputError, match=sentence), locked(tmp_path / "run"):
        pass
    process.communicate()
    with locked(tmp_path / "run"):
        pass
    assert names(tmp_path) == []


def test_the_lock_of_a_killed_process_is_free_and_its_unfinished_files_are_swept(tmp_path, other):
    process = other()
    with pytest.raises(KeyError), replacing(tmp_path / "run" / "model") as temporary:
        temporary.write_text("half")
        kept = temporary.rename(tmp_path / "kept")
        raise KeyError
    process.kill()
    process.wait()
    kept.rename(temporary)
    (tmp_path / "run" / "other.tmp").write_text("of somebody else")
    assert len(names(tmp_path / "run")) == 3
    with locked(tmp_path / "run"):
        assert names(tmp_path / "run") == [files.LOCK, "other.tmp"]
    assert names(tmp_path / "run") == ["other.tmp"]


def test_sweeping_leaves_what_another_process_works_on(tmp_path, other):
    process = other()
    sweep(tmp_path / "run")
    assert names(tmp_path / "run") == [files.LOCK]
    process.kill()
    process.wait()
    sweep(tmp_path / "run")
    sweep(tmp_path / "none")
    assert names(tmp_path) == ["run"]


@pytest.mark.slow
def test_waiting_says_for_whom_and_ends_with_the_lock(tmp_path, other):
    process = other()
    waiting = [sys.executable, "-c", HOLD.replace("[1])", "[1]), wait=True"), str(tmp_path / "run")]
    second = subprocess.Popen(waiting, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert f"waiting for process {process.pid} on " in second.stderr.readline()
    process.communicate()
    assert second.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"process {second.pid} on"), locked(tmp_path / "run"):
        pass
    second.communicate()
    assert names(tmp_path) == []


@pytest.mark.slow
def test_many_processes_hold_the_lock_one_after_another(tmp_path):
    """Each reads a counter, sleeps and writes it back: an update would be lost if two were inside at once."""
    count = (
        "import sys, time; from pathlib import Path; from fastprompt.files import locked\n"
        "file = Path(sys.argv[1]) / 'counter'\n"
        "for _ in range(20):\n"
        "    with locked(file.parent, wait=True):\n"
        "        found = int(file.read_text()) if file.exists() else 0\n"
        "        time.sleep(0.001); file.write_text(str(found + 1))\n"
    )
    folder = tmp_path / "run"
    processes = [subprocess.Popen([sys.executable, "-c", count, str(folder)], stderr=subprocess.DEVNULL) for _ in "123"]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert (folder / "counter").read_text() == "60" and names(folder) == ["counter"]


@pytest.mark.slow
def test_a_folder_that_others_make_and_remove_at_the_same_time_is_locked(tmp_path):
    """An empty folder goes with its lock, between any two of the steps in which another process takes it."""
    take = (
        "import sys; from pathlib import Path; from fastprompt.files import locked\n"
        "for _ in range(500):\n"
        "    with locked(Path(sys.argv[1]), wait=True): pass\n"
    )
    command = [sys.executable, "-c", take, str(tmp_path / "runs" / "run")]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in "123"]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file: cannot be written \(File exists\)"), locked(tmp_path / "file"):
        pass


def test_a_file_system_without_locks_is_said_once_and_used(tmp_path, monkeypatch, caplog):
    def unknown(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", unknown)
    with locked(tmp_path / "run"):
        write_file(tmp_path / "run" / "a", "x")
    assert caplog.text.count("cannot be locked (Function not implemented)") == 1 and names(tmp_path / "run") == ["a"]


def test_where_nothing_can_be_locked_no_open_file_is_removed(tmp_path, monkeypatch):
    unlink = Path.unlink

    def as_windows_does(self, missing_ok=False):
        if any(os.path.realpath(opened) == str(self) for opened in list(Path("/proc/self/fd").iterdir())):
            raise PermissionError(13, "used by another process", str(self))
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setattr(Path, "unlink", as_windows_does)
    with locked(tmp_path / "run"):
        write_file(tmp_path / "run" / "a", "x")
    assert names(tmp_path) == ["run", "run/a"]
    with locked(tmp_path / "empty"):
        pass
    assert names(tmp_path) == ["run", "run/a"]


def test_a_lock_of_the_same_process_is_refused_too(tmp_path):
    started = time.monotonic()
    with locked(tmp_path / "run"):
        with pytest.raises(InputError, match=f"process {os.getpid()} on"), locked(tmp_path / "run"):
            pass
        assert (tmp_path / "run" / files.LOCK).exists()
    assert time.monotonic() - started < 1

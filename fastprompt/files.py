"""Files that survive a kill or a full disk: written whole or not at all, by one process at a time.

Locks are POSIX's. On Windows nothing is locked, and two processes that write into one folder are not kept apart.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import IO

import safetensors
import safetensors.torch
from torch import Tensor

from fastprompt.documents import absolute_path, check_file
from fastprompt.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".fastprompt-lock"  # in a folder that a process writes into
TEMPORARY = ".fastprompt-tmp"  # how the names of unfinished files end
MOST_TRIES = 1000  # to lock a folder that others make and remove meanwhile
# What file systems say that do not know an operation.
_UNKNOWN = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)

_log = logging.getLogger(__name__)


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Give a temporary path beside ``file``; what the block writes there becomes ``file`` when it ends.

    Its bytes are on the disk before it gets its name: after a kill or a power cut there is the old file or the new one.
    When the block raises, the old file stays and the temporary goes; after a kill, ``locked`` sweeps it.

    Raises:
        InputError: The disk is full, the folder cannot be written, or whatever else the system says, in one sentence.
    """
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        temporary.replace(file)
        _sync_folder(file.parent)
    except OSError as error:
        raise _cannot_write(file, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_file(file: Path, content: bytes | str) -> None:
    """Write a file as ``replacing`` does; text as UTF-8."""
    with replacing(file) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors, on any device, and strings in the safetensors format, as ``replacing`` does.

    The same tensors and strings give the same bytes.
    """
    with replacing(file) as temporary, temporary.open("wb") as opened:
        opened.writelines(tensor_bytes(tensors, metadata or {}))


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, memoryview]:
    """Make the content of a safetensors file: its header, and the tensors."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = safetensors.torch.save(on_cpu, dict(metadata))
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(metadata.items()))  # the library writes them in an order of its own every time
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, memoryview(content)[end:]


def read_tensors(file: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read all tensors of a safetensors file, on the CPU, and its metadata.

    Args:
        file: the file.
        what: how messages call it, such as "model".

    Raises:
        InputError: The file cannot be read as safetensors.
    """
    check_file(file, what)
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except Exception as error:  # over a damaged file the reader stumbles in more ways than SafetensorError
        raise InputError(f"{what} {file}: expected a safetensors file, got one that is damaged ({error})") from error


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Be the only process that writes into a folder, which is made if need be; on Windows, nothing keeps others out.

    Unfinished files of killed processes are removed first. A process that dies loses its lock, which the system keeps.
    A folder that was made for this and is empty in the end is removed.

    Args:
        folder: What to lock. Reading needs no lock.
        wait: Whether to wait for a process that holds it, after a warning that names it.

    Raises:
        InputError: Another process holds it (the sentence says which, and since when), or it cannot be written.
    """
    folder = absolute_path(folder)
    made: list[Path] = []
    try:
        lock = _take(folder, wait, made)
        for left in folder.glob(f".*{TEMPORARY}"):
            left.unlink()
    except OSError as error:
        _remove_empty(made)
        raise _cannot_write(folder, error) from error
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)  # first, so that whoever opened it sees that it is not the lock now
        _remove_empty(made)
        lock.close()  # last: who waits for it finds the folder gone, and makes it anew as its own


def sweep(folder: Path) -> None:
    """Remove what a killed process left in a folder; where one is at work, or nothing may be written, all stays."""
    if (folder / LOCK).exists():
        try:
            with locked(folder):
                return  # which swept it
        except InputError:
            return


def _take(folder: Path, wait: bool, made: list[Path]) -> IO[str]:
    """The lock file, held as long as it is open; folders that had to be made, deepest first, go to ``made``."""
    for tries_left in reversed(range(MOST_TRIES)):
        made[:] = [place for place in (folder, *folder.parents) if not place.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if fcntl is None:
                return io.StringIO()  # no lock file, either: Windows removes none that is open
            lock = (folder / LOCK).open("a+")
        except (FileNotFoundError, FileExistsError):  # the folder was removed meanwhile, as an empty one is
            if not tries_left:
                raise
            continue
        try:
            _flock(lock, folder, wait)
            if _is_file(lock, folder / LOCK):
                _sign(lock)
                return lock
        except BaseException:
            lock.close()
            raise
        lock.close()  # of a file that its holder removed meanwhile
    raise TimeoutError(errno.ETIMEDOUT, "other processes take and leave it all the time", str(folder))


def _is_file(opened: IO[str], file: Path) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(opened.fileno()), file.stat())
    except FileNotFoundError:
        return False


def _sign(lock: IO[str]) -> None:
    """Write into a lock who holds it; on a full disk it goes again."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()} since {now}")
        lock.flush()
    except OSError:
        Path(lock.name).unlink(missing_ok=True)
        raise


def _flock(lock: IO[str], folder: Path, wait: bool) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        holder = lock.read(200) or "another process"
        if not wait:
            raise InputError(
                f"{folder}: expected no other process to write here, but {holder} does: wait for it, or choose "
                "another folder"
            ) from error
        _log.warning("%s: waiting for %s, which writes here", folder, holder)
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        _log.warning("%s: cannot be locked (%s): let one process at a time write here", folder, error.strerror)


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, the deepest first, up to one that is in use."""
    try:
        for folder in folders:
            folder.rmdir()
    except OSError:  # not empty, and so are those above
        return


def _sync_folder(folder: Path) -> None:
    """Make renames in a folder last, on systems whose folders can be opened."""
    if os.name != "posix":
        return
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
    finally:
        os.close(opened)


def _cannot_write(file: Path, error: OSError) -> InputError:
    return InputError(f"{file}: cannot be written ({error.strerror or error})")

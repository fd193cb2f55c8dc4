"""Features of images on disk, so that a frozen image tower sees each image once."""

import hashlib
import logging
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastprompt.data.reading import default_workers
from fastprompt.errors import InputError
from fastprompt.progress import progress_bar, say_line

SHARD_ROWS = 256
"""Images in a full shard: at most this many (and one batch) are encoded again after a kill."""

_ROWS = "sha256 of rows"  # metadata entry of a shard: hex digests of the image files, separated by spaces
_log = logging.getLogger(__name__)

Images = TypeVar("Images", bound=Sized)
"""A batch of images in whatever form the encoder takes, such as a (B, 3, S, S) tensor."""

Read = Callable[[Sequence[Path]], Images]
"""Files to a batch of as many images; the same file must always give the same image."""

Encode = Callable[[Images], dict[str, Tensor]]
"""A batch of B images to named features with B rows each."""


def default_cache_dir() -> Path:
    """Return $FASTPROMPT_CACHE, else $XDG_CACHE_HOME/fastprompt, else ~/.cache/fastprompt."""
    if chosen := os.environ.get("FASTPROMPT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fastprompt"


@dataclass(frozen=True)
class CachedFeatures:
    """Features of n images that stay on disk until they are asked for.

    Attributes:
        shards: Named tensors of each shard, memory-mapped.
        shard: (n,) int64, the shard of each image.
        row: (n,) int64, its row there.
    """

    shards: Sequence[dict[str, Tensor]]
    shard: Tensor
    row: Tensor

    def __len__(self) -> int:
        return len(self.row)

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """Gather features.

        Args:
            indices: (B,) integers in 0 .. n-1; any order, repeats allowed.

        Returns:
            Named tensors in memory with B rows each, in the order asked for.
        """
        shard, row = self.shard[indices], self.row[indices]
        out = {
            name: torch.empty((len(row), *stored.shape[1:]), dtype=stored.dtype)
            for name, stored in self.shards[0].items()
        }
        for number in shard.unique().tolist():
            here = (shard == number).nonzero().squeeze(1)
            for name, stored in self.shards[number].items():
                out[name][here] = stored.index_select(0, row[here])
        return out


class FeatureCache:
    """A folder of feature shards; one row an image, found by the SHA-256 of the image file's content.

    A shard is a safetensors file of about 256 rows, written once under a name of its own and renamed into place; its
    metadata lists the digests of its rows. There is no other index, so nothing can disagree, processes may share a
    folder, and a process that is killed loses only the shard that it was filling.

    Args:
        folder: Parent folder of all caches, for example ``default_cache_dir()``.
        key: Everything else that the features depend on: fingerprint of the backbone, description of what is done to
            an image before, precision. Another key is another cache.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder = Path(folder).expanduser() / hashlib.sha256(key.encode()).hexdigest()[:32]
        self._shards: list[dict[str, Tensor]] = []
        self._read: set[str] = set()  # file names of the shards above
        self._places: dict[str, tuple[int, int]] = {}  # digest -> shard, row

    def load(
        self,
        paths: Sequence[Path],
        encode: Encode,
        read: Read,
        *,
        batch_size: int = 32,
        workers: int | None = None,
        progress: bool = True,
        what: str = "images",
    ) -> CachedFeatures:
        """Return the features of images, encoding those that the cache lacks; equal files are encoded once.

        Whatever ends the work early (Ctrl-C, an unreadable image), what was encoded before is kept.

        Args:
            paths: n image files.
            encode: Turns a batch of at most ``batch_size`` images into features; may return them on any device.
            read: Reads files for ``encode``; called from another thread, while ``encode`` works on the batch before.
            batch_size: Images a call of ``encode``.
            workers: Threads that hash files; None for one a core, at most 8.
            progress: Whether to show bars.
            what: What the images are, for the bar: "test images", for instance.

        Raises:
            InputError: If an image cannot be read, or a shard is damaged.
        """
        if batch_size < 1:
            raise InputError(f"image batch: expected at least 1 image, got {batch_size}")
        if not paths:
            raise InputError("feature cache: expected at least one image, got none")
        digests = hash_files(paths, workers=workers, progress=progress)
        self._read_new_shards()
        missing = {digest: path for digest, path in zip(digests, paths, strict=True) if digest not in self._places}
        _log.info("%s: %d images, %d of them to encode", self.folder, len(set(digests)), len(missing))
        if missing:
            batches = _batches(list(missing.values()), read, batch_size)
            self._encode(missing, batches, encode, progress, what)
            self._read_new_shards()
        places = torch.tensor([self._places[digest] for digest in digests])  # (n, 2)
        return CachedFeatures(tuple(self._shards), *places.unbind(1))

    def _encode(
        self, missing: dict[str, Path], batches: Iterator[Images], encode: Encode, progress: bool, what: str
    ) -> None:
        shard = _ShardWriter(self.folder)
        digests = list(missing)
        done = 0
        try:
            with progress_bar(what=f"encoding {what}", shown=progress, total=len(digests), unit="image") as bar:
                say_line(f"encoding {len(digests)} {what}", bar, shown=progress)
                for images in batches:
                    shard.add(digests[done : done + len(images)], encode(images))
                    done += len(images)
                    bar.update(len(images))
        finally:
            shard.flush()

    def _read_new_shards(self) -> None:
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._read:
                continue
            tensors, digests = _read_shard(path)
            for row, digest in enumerate(digests):
                self._places[digest] = (len(self._shards), row)
            self._shards.append(tensors)
            self._read.add(path.name)


@dataclass
class _ShardWriter:
    """Collects rows and writes them as shards."""

    folder: Path
    pending: list[tuple[list[str], dict[str, Tensor]]] = field(default_factory=list)

    def add(self, digests: list[str], features: dict[str, Tensor]) -> None:
        for name, tensor in features.items():
            if len(tensor) != len(digests):
                raise ValueError(f"encode: expected {len(digests)} rows of {name!r}, got {len(tensor)}")
        self.pending.append((digests, {name: tensor.detach().cpu() for name, tensor in features.items()}))
        if sum(len(rows) for rows, _ in self.pending) >= SHARD_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write what is pending under a temporary name, then rename: a reader sees whole shards only."""
        if not self.pending:
            return
        digests = [digest for rows, _ in self.pending for digest in rows]
        tensors = {name: torch.cat([features[name] for _, features in self.pending]) for name in self.pending[0][1]}
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        unfinished = path.with_suffix(".unfinished")
        try:
            save_file(tensors, unfinished, metadata={_ROWS: " ".join(digests)})
            unfinished.replace(path)
            self.pending = []
        finally:
            unfinished.unlink(missing_ok=True)


def _read_shard(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read the header of a shard; the tensors stay on disk (memory-mapped)."""
    advice = "delete the file, and its images are encoded again"
    try:
        with safe_open(path, framework="pt", device="cpu") as shard:
            digests = (shard.metadata() or {}).get(_ROWS, "").split()
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise InputError(f"feature cache {path}: is damaged ({error}); {advice}") from error
    if not tensors or any(len(tensor) != len(digests) for tensor in tensors.values()):
        raise InputError(f"feature cache {path}: is damaged (it does not list one image a row); {advice}")
    return tensors, digests


def hash_files(paths: Sequence[Path], *, workers: int | None = None, progress: bool = True) -> list[str]:
    """Return the SHA-256 of every file's content as hex, on several threads; of one that did not change, from before.

    Raises:
        InputError: If a file is no regular file or cannot be read; the sentence names it.
    """
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        digests = pool.map(_hash_file, paths)
        # A bar only where there is something to wait for.
        return list(
            progress_bar(digests, what="hashing images", shown=progress, total=len(paths), unit="image", delay=2)
        )


def _hash_file(path: Path) -> str:
    try:
        state = path.stat()
        if not stat.S_ISREG(state.st_mode):  # reading a pipe would wait for ever
            raise InputError(f"image {path}: expected a file, found something else")
        return _hash_content(path, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
    except OSError as error:
        raise InputError(f"image {path}: cannot be read ({error.strerror})") from error


@lru_cache(maxsize=2**18)
def _hash_content(path: Path, *state: int) -> str:
    """The hash of a file in this state; a run asks several times, for its identity and for every cache."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _batches(paths: Sequence[Path], read: Read, batch_size: int) -> Iterator[Images]:
    """Yield batches of at most batch_size images; the next one is read while the caller works on this one."""
    chunks = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    with ThreadPoolExecutor(1) as ahead:
        upcoming = ahead.submit(read, chunks[0])
        for following in chunks[1:]:
            images = upcoming.result()
            upcoming = ahead.submit(read, following)
            yield images
        yield upcoming.result()

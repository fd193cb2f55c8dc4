"""Features of images on disk, so that a frozen image tower sees each image once."""

import hashlib
import itertools
import logging
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from fastprompt.data.reading import default_workers
from fastprompt.data.shards import Shard, damaged, write_shard
from fastprompt.documents import check_file, home_path
from fastprompt.errors import InputError
from fastprompt.files import locked, sweep
from fastprompt.progress import progress_bar, say_line

SHARD_ROWS = 256
"""Images in a full shard: at most this many (and one batch) are encoded again after a kill."""

FORMAT = "shards with checksums"  # caches of another format have other names
SAID_BYTES = 1e9  # features that take more on the disk are announced
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
        return home_path(chosen)
    return home_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fastprompt"


@dataclass(frozen=True)
class CachedFeatures:
    """Features of n images that stay on disk until they are asked for.

    Attributes:
        shards: Where they are.
        shard: (n,) int64, the shard of each image.
        row: (n,) int64, its row there.
    """

    shards: Sequence[Shard]
    shard: Tensor
    row: Tensor

    def __len__(self) -> int:
        return len(self.row)

    @cached_property
    def checksum(self) -> int:
        """CRC-32 of the rows' checksums, in order."""
        places = zip(self.shard.tolist(), self.row.tolist(), strict=True)
        return zlib.crc32(b"".join(self.shards[shard].checksums[row].to_bytes(4, "little") for shard, row in places))

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """Gather features.

        Args:
            indices: (B,) integers in 0 .. n-1; any order, repeats allowed.

        Returns:
            Named tensors in memory with B rows each, in the order asked for.

        Raises:
            InputError: If a file of the cache was damaged; it is read when it is asked for, and never mapped.
        """
        shard, row = self.shard[indices], self.row[indices]
        out = {
            name: torch.empty((len(row), *column.shape), dtype=column.dtype)
            for name, column in self.shards[0].columns.items()
        }
        for number in shard.unique().tolist():
            here = (shard == number).nonzero().squeeze(1)
            for name, read in self.shards[number].rows(row[here].tolist()).items():
                out[name][here] = read
        return out


class FeatureCache:
    """A folder of feature shards; one row an image, found by the SHA-256 of the image file's content.

    A shard is a safetensors file of about 256 rows, written once; its metadata lists digests and checksums of its rows.
    There is no other index, so nothing can disagree, and a process that is killed loses only the shard that it was
    filling. One process at a time fills a cache: others that lack images wait, and find them then.

    Args:
        folder: Parent folder of all caches, for example ``default_cache_dir()``.
        key: Everything else that the features depend on: fingerprint of the backbone, description of what is done to
            an image before, precision. Another key is another cache.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder = home_path(folder) / hashlib.sha256(f"{FORMAT} {key}".encode()).hexdigest()[:32]
        self._shards: dict[str, Shard] = {}  # by file name
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
            InputError: If an image cannot be read, a shard is damaged, or the disk has no room for the features.
        """
        if batch_size < 1:
            raise InputError(f"image batch: expected at least 1 image, got {batch_size}")
        if not paths:
            raise InputError("feature cache: expected at least one image, got none")
        digests = hash_files(paths, workers=workers, progress=progress)
        sweep(self.folder)
        self._open_new_shards()
        if not self._places.keys() >= set(digests):
            with locked(self.folder, wait=True):
                self._open_new_shards()  # of a process that was waited for
                missing = dict(zip(digests, paths, strict=True))
                missing = {digest: path for digest, path in missing.items() if digest not in self._places}
                _log.info("%s: %d images, %d of them to encode", self.folder, len(set(digests)), len(missing))
                if missing:
                    self._encode(missing, _batches(list(missing.values()), read, batch_size), encode, progress, what)
                    self._open_new_shards()
        places = torch.tensor([self._places[digest] for digest in digests])  # (n, 2)
        return CachedFeatures(tuple(self._shards.values()), *places.unbind(1))

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
                    features = encode(images)
                    if not done:
                        self._check_space(features, len(digests), what, bar, progress)
                    batch = digests[done : done + len(images)]
                    _check_unchanged([missing[digest] for digest in batch], batch)
                    shard.add(batch, features)
                    done += len(images)
                    bar.update(len(images))
        finally:
            shard.flush()

    def _check_space(self, features: dict[str, Tensor], images: int, what: str, bar: tqdm, progress: bool) -> None:
        """Say what the features will take on the disk if that is much, and refuse what it has no room for."""
        needed = images * sum(tensor.nbytes // max(len(tensor), 1) for tensor in features.values())
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"feature cache {self.folder}: expected {needed / 1e9:.2f} GB for the features of {images} {what}, got "
                f"{free / 1e9:.2f} GB of free disk: choose another --cache-dir, or --no-cache"
            )
        if progress and needed > SAID_BYTES:
            bar.write(f"features of {images} {what}: {needed / 1e9:.1f} GB in {self.folder}", file=sys.stderr)

    def _open_new_shards(self) -> None:
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in self._shards:
                continue
            shard = Shard.open(path, self.folder.name)
            for first in itertools.islice(self._shards.values(), 1):
                kinds = [{name: column.kind for name, column in one.columns.items()} for one in (first, shard)]
                if kinds[0] != kinds[1]:
                    raise damaged(path, f"its features have other shapes or types than those of {first.path.name}")
            for row, digest in enumerate(shard.digests):
                self._places[digest] = (len(self._shards), row)
            self._shards[path.name] = shard


@dataclass
class _ShardWriter:
    """Collects rows and writes them as shards, which are numbered."""

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
        """Write what is pending."""
        if not self.pending:
            return
        digests = [digest for rows, _ in self.pending for digest in rows]
        tensors = {name: torch.cat([features[name] for _, features in self.pending]) for name in self.pending[0][1]}
        path = next(path for path in map(self._path, itertools.count()) if not path.exists())
        write_shard(path, self.folder.name, digests, tensors)
        self.pending = []

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06}.safetensors"


def hash_files(
    paths: Sequence[Path], *, what: str = "image", workers: int | None = None, progress: bool = True
) -> list[str]:
    """Return the SHA-256 of every file's content as hex, on several threads; of one that did not change, from before.

    Args:
        paths: The files.
        what: How messages call one of them.
        workers: Threads; None for one a core, at most 8.
        progress: Whether to show a bar.

    Raises:
        InputError: If a file is no regular file or cannot be read; the sentence names it.
    """
    with ThreadPoolExecutor(workers or default_workers()) as pool:
        digests = pool.map(partial(_hash_file, what=what), paths)
        # A bar only where there is something to wait for.
        return list(
            progress_bar(digests, what="hashing images", shown=progress, total=len(paths), unit="image", delay=2)
        )


def _hash_file(path: Path, what: str) -> str:
    try:
        check_file(path, what)
        state = path.stat()
        return _hash_content(path, state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)
    except OSError as error:
        raise InputError(f"{what} {path}: cannot be read ({error.strerror})") from error


@lru_cache(maxsize=2**18)
def _hash_content(path: Path, *state: int) -> str:
    """The hash of a file in this state; a run asks several times, for its identity and for every cache."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_unchanged(paths: Sequence[Path], digests: Sequence[str]) -> None:
    """Raise ``InputError`` where a file that was hashed is another one now that it was read."""
    for path, before, now in zip(paths, digests, hash_files(paths, progress=False), strict=True):
        if before != now:
            raise InputError(f"image {path}: expected a file that stays as it is, got one that changed when read")


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

"""Features of images on disk, so that a frozen image tower sees each image once."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import shutil
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from fastprompt.data.reading import default_workers
from fastprompt.data.shards import CachedTensor, Shard, ShardWriter, damaged
from fastprompt.documents import check_file, home_path
from fastprompt.errors import InputError
from fastprompt.files import locked, sweep
from fastprompt.progress import progress_bar, say_line

SHARD_ROWS = 256
"""Images in a full shard: at most this many (and one batch) are encoded again after a kill."""

FORMAT = "shards of one tensor with checksums"  # caches of another format have other names
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
        tensors: Those that were loaded, by name.
    """

    tensors: Mapping[str, CachedTensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    @cached_property
    def checksum(self) -> int:
        """CRC-32 of the checksums of all rows, in order."""
        return zlib.crc32(b"".join(self.tensors[name].checksum.to_bytes(4, "little") for name in sorted(self.tensors)))

    def rows(self, indices: Tensor, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Gather features.

        Args:
            indices: (B,) integers in 0 .. n-1; any order, repeats allowed.
            names: Of the tensors to read; those that were not loaded are left out. None for all.

        Returns:
            Named tensors in memory with B rows each, in the order asked for.

        Raises:
            InputError: If a file of the cache was damaged; it is read when it is asked for, and never mapped.
        """
        return {name: one.rows(indices) for name, one in self.tensors.items() if names is None or name in names}


class FeatureCache:
    """A folder of feature shards; one row an image, found by the SHA-256 of the image file's content.

    A shard is a safetensors file of about 256 rows of one tensor, written once; its metadata lists digests and
    checksums of its rows. There is no other index, so nothing can disagree, and a process that is killed loses only the
    shards that it was filling. A tensor that an image lacks is made when it is asked for, and the others stay as they
    are. One process at a time fills a cache: others that lack images wait, and find them then.

    Args:
        folder: Parent folder of all caches, for example ``default_cache_dir()``.
        key: Everything else that the features depend on: fingerprint of the backbone, description of what is done to
            an image before, precision. Another key is another cache.
    """

    def __init__(self, folder: str | Path, key: str) -> None:
        self.folder = home_path(folder) / hashlib.sha256(f"{FORMAT} {key}".encode()).hexdigest()[:32]
        self._shards: dict[str, dict[str, Shard]] = defaultdict(dict)  # name of the tensor -> file name -> shard
        self._places: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)  # name -> digest -> shard, row

    def load(
        self,
        paths: Sequence[Path],
        encode: Encode,
        read: Read,
        names: Collection[str],
        *,
        batch_size: int = 32,
        workers: int | None = None,
        progress: bool = True,
        what: str = "images",
    ) -> CachedFeatures:
        """Return features of images, encoding the images of which the cache lacks some; equal files are encoded once.

        Whatever ends the work early (Ctrl-C, an unreadable image), what was encoded before is kept.

        Args:
            paths: n image files.
            encode: Turns a batch of at most ``batch_size`` images into features; may return them on any device.
            read: Reads files for ``encode``; called from another thread, while ``encode`` works on the batch before.
            names: Of the tensors to return; others that ``encode`` makes are dropped.
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
        if self._lacks(digests, names):
            with locked(self.folder, wait=True):
                self._open_new_shards()  # of a process that was waited for
                by_digest = dict(zip(digests, paths, strict=True))
                missing = {digest: by_digest[digest] for digest in self._lacks(by_digest, names)}
                _log.info("%s: %d images, %d of them to encode", self.folder, len(by_digest), len(missing))
                if missing:
                    batches = _batches(list(missing.values()), read, batch_size)
                    self._encode(missing, batches, encode, names, progress, what)
                    self._open_new_shards()
        return CachedFeatures({name: self._tensor(name, digests) for name in sorted(names)})

    def _lacks(self, digests: Iterable[str], names: Collection[str]) -> list[str]:
        """The images of which the cache lacks one of these tensors."""
        return [digest for digest in digests if any(digest not in self._places[name] for name in names)]

    def _tensor(self, name: str, digests: Sequence[str]) -> CachedTensor:
        places = torch.tensor([self._places[name][digest] for digest in digests])  # (n, 2)
        return CachedTensor(tuple(self._shards[name].values()), *places.unbind(1))

    def _encode(
        self,
        missing: dict[str, Path],
        batches: Iterator[Images],
        encode: Encode,
        names: Collection[str],
        progress: bool,
        what: str,
    ) -> None:
        writers = [ShardWriter(self.folder, name, self._places[name]) for name in sorted(names)]
        upcoming = iter(missing.items())
        try:
            with progress_bar(what=f"encoding {what}", shown=progress, total=len(missing), unit="image") as bar:
                say_line(f"encoding {len(missing)} {what}", bar, shown=progress)
                for number, images in enumerate(batches):
                    features = encode(images)
                    if not number:
                        needed = sum(writer.bytes_for(missing, features) for writer in writers)
                        self._check_space(needed, len(missing), what, bar, progress)
                    batch = dict(itertools.islice(upcoming, len(images)))
                    _check_unchanged(batch)
                    for writer in writers:
                        writer.add(list(batch), features)
                    for writer in writers:  # all have this batch now, whatever interrupts the writing
                        writer.flush(SHARD_ROWS)
                    bar.update(len(images))
        finally:
            for writer in writers:
                writer.flush()

    def _check_space(self, needed: int, images: int, what: str, bar: tqdm, progress: bool) -> None:
        """Say what the features will take on the disk if that is much, and refuse what it has no room for."""
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise InputError(
                f"feature cache {self.folder}: expected {needed / 1e9:.2f} GB for the features of {images} {what}, got "
                f"{free / 1e9:.2f} GB of free disk: choose another --cache-dir, or --no-cache"
            )
        if progress and needed > SAID_BYTES:
            bar.write(f"features of {images} {what}: {needed / 1e9:.1f} GB in {self.folder}", file=sys.stderr)

    def _open_new_shards(self) -> None:
        opened = {file for shards in self._shards.values() for file in shards}
        for path in sorted(self.folder.glob("*.safetensors")):
            if path.name in opened:
                continue
            shard = Shard.open(path, self.folder.name)
            others = self._shards[shard.name]
            for first in itertools.islice(others.values(), 1):
                if (first.dtype, first.shape) != (shard.dtype, shard.shape):
                    raise damaged(path, f"its features have other shapes or types than those of {first.path.name}")
            for row, digest in enumerate(shard.digests):
                self._places[shard.name][digest] = (len(others), row)
            others[path.name] = shard


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


def _check_unchanged(files: Mapping[str, Path]) -> None:
    """Raise ``InputError`` where a file of this digest is another one now that it was read."""
    for (digest, path), now in zip(files.items(), hash_files(list(files.values()), progress=False), strict=True):
        if digest != now:
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

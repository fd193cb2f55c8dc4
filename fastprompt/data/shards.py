"""Files of cached features: a tensor each, with one row an image, each row with a checksum."""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import safetensors
import torch
from torch import Tensor

from fastprompt.documents import check_file
from fastprompt.errors import InputError
from fastprompt.files import write_tensors

# Entries of a shard's metadata.
_CACHE = "cache"
_ROWS = "sha256 of rows"  # of the image files, in hex, separated by spaces
_CHECKSUMS = "crc32 of rows"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """A file of rows of one tensor, read row by row and never mapped: one that was cut short is an error, not a crash.

    Attributes:
        path: The file.
        name: Of the tensor.
        dtype: Of its elements.
        shape: Of one row.
        start: Offset of its first row in the file, in bytes.
        digests: SHA-256 of the image file of each row.
        checksums: CRC-32 of each row: of its digest, of name, type and shape of the tensor, and of its bytes.
        checked: Rows whose checksum was compared.
    """

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    digests: Sequence[str]
    checksums: Sequence[int]
    checked: set[int] = field(default_factory=set)

    @classmethod
    def open(cls, path: Path, cache: str) -> Shard:
        """Read the header.

        Args:
            path: A file that ``write_shard`` wrote.
            cache: Name of the cache that it must belong to.

        Raises:
            InputError: It is damaged, or of another cache.
        """
        check_file(path, "feature cache")
        try:
            with safetensors.safe_open(path, framework="pt") as checked:  # compares header and size of the file
                metadata = checked.metadata() or {}
            with path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            header.pop("__metadata__")
            ((name, entry),) = header.items()
            (rows, *shape), start = entry["shape"], 8 + size + entry["data_offsets"][0]
            dtype = DTYPES[entry["dtype"]]
            digests, checksums = metadata[_ROWS].split(), [int(one, 16) for one in metadata[_CHECKSUMS].split()]
        except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
            raise damaged(path, str(error)) from error
        if not rows == len(digests) == len(checksums):
            raise damaged(path, "it does not list one image a row")
        if metadata.get(_CACHE) != cache:
            raise damaged(path, "it belongs to another cache")
        return cls(path, name, dtype, tuple(shape), start, digests, checksums)

    def rows(self, numbers: Sequence[int]) -> Tensor:
        """Read rows into memory, in the order asked for; each is compared with its checksum when it is first read.

        Raises:
            InputError: The file was damaged or cut short.
        """
        out = torch.empty((len(numbers), *self.shape), dtype=self.dtype)
        try:
            with self.path.open("rb", buffering=0) as file:
                for number, target in zip(numbers, _bytes_of_rows(out), strict=True):
                    file.seek(self.start + number * len(target))
                    if file.readinto(target) != len(target):
                        raise damaged(self.path, "it was cut short")
        except OSError as error:
            raise damaged(self.path, error.strerror) from error
        fresh = [place for place, number in enumerate(numbers) if number not in self.checked]
        sums = checksums_of(self.name, out[fresh], [self.digests[numbers[place]] for place in fresh])
        for place, found in zip(fresh, sums, strict=True):
            if found != self.checksums[numbers[place]]:
                raise damaged(self.path, f"row {numbers[place]} does not have its checksum")
            self.checked.add(numbers[place])
        return out


@dataclass(frozen=True)
class CachedTensor:
    """A tensor with a row for each of n images, which stay on disk until they are asked for.

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
        """CRC-32 of the checksums of the rows, in order."""
        places = zip(self.shard.tolist(), self.row.tolist(), strict=True)
        return zlib.crc32(b"".join(self.shards[shard].checksums[row].to_bytes(4, "little") for shard, row in places))

    def rows(self, indices: Tensor) -> Tensor:
        """The rows at ``indices`` in memory, in the order asked for."""
        shard, row = self.shard[indices], self.row[indices]
        out = torch.empty((len(row), *self.shards[0].shape), dtype=self.shards[0].dtype)
        for number in shard.unique().tolist():
            here = (shard == number).nonzero().squeeze(1)
            out[here] = self.shards[number].rows(row[here].tolist())
        return out


@dataclass
class ShardWriter:
    """Collects rows of one tensor that the cache lacks, and writes them as shards, which are numbered.

    Attributes:
        folder: Of the cache.
        name: Of the tensor.
        known: Digests of the images whose rows the cache has.
        digests: Of the rows that are pending.
        pending: These rows.
    """

    folder: Path
    name: str
    known: Collection[str]
    digests: list[str] = field(default_factory=list)
    pending: list[Tensor] = field(default_factory=list)

    def bytes_for(self, digests: Iterable[str], features: Mapping[str, Tensor]) -> int:
        """What the rows of these images will take, after those of the first batch."""
        return sum(digest not in self.known for digest in digests) * features[self.name][:1].nbytes

    def add(self, digests: Sequence[str], features: Mapping[str, Tensor]) -> None:
        """Take the rows of these images, as far as the cache lacks them."""
        tensor = features[self.name]
        if len(tensor) != len(digests):
            raise ValueError(f"encode: expected {len(digests)} rows of {self.name!r}, got {len(tensor)}")
        lacking = [row for row, digest in enumerate(digests) if digest not in self.known]
        self.digests += [digests[row] for row in lacking]
        self.pending.append(tensor.detach()[lacking].cpu())

    def flush(self, rows: int = 1) -> None:
        """Write what is pending, if it is at least so many rows."""
        if len(self.digests) < rows:
            return
        path = next(path for path in map(self._path, itertools.count()) if not path.exists())
        write_shard(path, self.folder.name, self.digests, self.name, torch.cat(self.pending))
        self.digests, self.pending = [], []

    def _path(self, number: int) -> Path:
        return self.folder / f"{self.name}-{number:06}.safetensors"


def write_shard(path: Path, cache: str, digests: Sequence[str], name: str, tensor: Tensor) -> None:
    """Write n rows.

    Args:
        path: The file.
        cache: Name of the cache that it belongs to.
        digests: Of the n images.
        name: Of the tensor.
        tensor: n rows on the CPU.

    Raises:
        InputError: The file cannot be written.
    """
    checksums = (f"{checksum:08x}" for checksum in checksums_of(name, tensor, digests))
    write_tensors(path, {name: tensor}, {_CACHE: cache, _ROWS: " ".join(digests), _CHECKSUMS: " ".join(checksums)})


def checksums_of(name: str, tensor: Tensor, digests: Sequence[str]) -> list[int]:
    """The checksum of each row."""
    kind = f"{name} {tensor.dtype} {tuple(tensor.shape[1:])}"
    seeds = (zlib.crc32(f"{digest}{kind}".encode()) for digest in digests)
    return [zlib.crc32(row, seed) for row, seed in zip(_bytes_of_rows(tensor), seeds, strict=True)]


def damaged(path: Path, why: str) -> InputError:
    """The sentence about a shard that cannot be used."""
    return InputError(f"feature cache {path}: is damaged ({why}); delete the file, and its images are encoded again")


def _bytes_of_rows(tensor: Tensor) -> np.ndarray:
    """The memory of each row, as (n, bytes of a row); shared with a contiguous tensor."""
    rows = len(tensor)
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().reshape(rows, -1 if rows else 0)

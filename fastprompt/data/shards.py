"""Files of cached features: named tensors with one row an image, each row with a checksum."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
class Column:
    """Where a tensor of a shard stands.

    Attributes:
        dtype: Of its elements.
        shape: Of one row.
        start: Offset of its first row in the file, in bytes.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def kind(self) -> tuple[torch.dtype, tuple[int, ...]]:
        """What the columns of one name have in common in all shards of a cache."""
        return self.dtype, self.shape


@dataclass(frozen=True)
class Shard:
    """A file of features that is read row by row, and never mapped: a file that was cut short is an error, not a crash.

    Attributes:
        path: The file.
        digests: SHA-256 of the image file of each row.
        checksums: CRC-32 of each row: of its digest, and of name, type, shape and bytes of every tensor.
        columns: The tensors.
        checked: Rows whose checksum was compared.
    """

    path: Path
    digests: Sequence[str]
    checksums: Sequence[int]
    columns: Mapping[str, Column]
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
            columns = {
                name: Column(DTYPES[entry["dtype"]], tuple(entry["shape"][1:]), 8 + size + entry["data_offsets"][0])
                for name, entry in header.items()
            }
            digests, checksums = metadata[_ROWS].split(), [int(one, 16) for one in metadata[_CHECKSUMS].split()]
            whole = {len(checksums), *(entry["shape"][0] for entry in header.values())} == {len(digests)}
        except (safetensors.SafetensorError, OSError, KeyError, ValueError, IndexError) as error:
            raise damaged(path, str(error)) from error
        if not whole or not columns:
            raise damaged(path, "it does not list one image a row")
        if metadata.get(_CACHE) != cache:
            raise damaged(path, "it belongs to another cache")
        return cls(path, digests, checksums, columns)

    def rows(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Read rows into memory, in the order asked for; each is compared with its checksum when it is first read.

        Raises:
            InputError: The file was damaged or cut short.
        """
        out = {name: torch.empty((len(numbers), *of.shape), dtype=of.dtype) for name, of in self.columns.items()}
        try:
            with self.path.open("rb", buffering=0) as file:
                for name, column in self.columns.items():
                    for number, target in zip(numbers, _bytes_of_rows(out[name]), strict=True):
                        file.seek(column.start + number * len(target))
                        if file.readinto(target) != len(target):
                            raise damaged(self.path, "it was cut short")
        except OSError as error:
            raise damaged(self.path, error.strerror) from error
        fresh = [place for place, number in enumerate(numbers) if number not in self.checked]
        sums = checksums_of(
            {name: tensor[fresh] for name, tensor in out.items()}, [self.digests[numbers[i]] for i in fresh]
        )
        for place, found in zip(fresh, sums, strict=True):
            if found != self.checksums[numbers[place]]:
                raise damaged(self.path, f"row {numbers[place]} does not have its checksum")
            self.checked.add(numbers[place])
        return out


def write_shard(path: Path, cache: str, digests: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Write n rows.

    Args:
        path: The file.
        cache: Name of the cache that it belongs to.
        digests: Of the n images.
        tensors: Named tensors on the CPU with n rows each.

    Raises:
        InputError: The file cannot be written.
    """
    checksums = (f"{checksum:08x}" for checksum in checksums_of(tensors, digests))
    write_tensors(path, tensors, {_CACHE: cache, _ROWS: " ".join(digests), _CHECKSUMS: " ".join(checksums)})


def checksums_of(tensors: Mapping[str, Tensor], digests: Sequence[str]) -> list[int]:
    """The checksum of each row, in whatever order the tensors stand."""
    sums = [zlib.crc32(digest.encode()) for digest in digests]
    for name in sorted(tensors):
        tensor = tensors[name]
        kind = f"{name} {tensor.dtype} {tuple(tensor.shape[1:])}".encode()
        sums = [zlib.crc32(row, zlib.crc32(kind, one)) for one, row in zip(sums, _bytes_of_rows(tensor), strict=True)]
    return sums


def damaged(path: Path, why: str) -> InputError:
    """The sentence about a shard that cannot be used."""
    return InputError(f"feature cache {path}: is damaged ({why}); delete the file, and its images are encoded again")


def _bytes_of_rows(tensor: Tensor) -> np.ndarray:
    """The memory of each row, as (n, bytes of a row); shared with a contiguous tensor."""
    rows = len(tensor)
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().reshape(rows, -1 if rows else 0)

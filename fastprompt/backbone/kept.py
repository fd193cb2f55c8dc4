"""Values that are made once and kept for as long as all that they were made from stays the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable
from dataclasses import is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")

MOST = 192  # values at a time, however small: a list of class names brings three


class Kept:
    """Keeps what was made for the keys used last: ``MOST`` values, and no more than fit into ``limit`` bytes.

    Copies and pickles start empty.

    Tensors that a value was made from are compared by value with copies of them. Neither address nor version of a
    tensor tells whether it changed: writing through ``.data``, as moving averages of weights do, leaves both as they
    are.
    """

    def __init__(self, limit: float = math.inf) -> None:
        self.limit = limit
        self._entries: dict[Hashable, tuple[list[Any], Any]] = {}

    def __reduce__(self) -> tuple:
        return Kept, (self.limit,)

    @torch.compiler.disable  # a look-up on the host: compiled code would be made anew for every key
    @torch.inference_mode(False)  # what is kept may serve a training later
    @torch.no_grad()
    def get(self, key: Hashable, make: Callable[[], Made], made_from: Iterable[Any] = (), *, keep: bool = True) -> Made:
        """Return what ``make`` returned for an equal key and equal values of what it reads.

        Inside of a caller's CUDA-graph capture nothing is kept, for nothing is computed before a replay, and tensors
        cannot be compared, for which the host would wait: there, what they decide is computed anew.

        Args:
            key: names the value; one is kept a key.
            make: computes it, without gradient and outside of a caller's inference mode.
            made_from: tensors and other values that decide the result. Large tensors are better told apart by
                ``versions``.
            keep: False drops the value that was kept, and does not keep the new one.
        """
        made_from = list(made_from)
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        if capturing and any(isinstance(x, Tensor) for x in made_from):
            return make()
        known, value = self._entries.pop(key, (None, None))
        if known is None or not _equal(known, made_from):
            known = [x.detach().clone() if isinstance(x, Tensor) else x for x in made_from]
            value, keep = make(), keep and not capturing
        if keep and self.has_room(value):
            self._entries[key] = known, value  # behind all others
            while len(self._entries) > MOST or sum(nbytes(kept) for _, kept in self._entries.values()) > self.limit:
                del self._entries[next(iter(self._entries))]
        return value

    def has_room(self, value: object) -> bool:
        """Return whether a value can be kept at all; what cannot is made anew every time."""
        return nbytes(value) <= self.limit


def versions(tensors: Iterable[Tensor]) -> list[tuple]:
    """Return what tells tensors apart without reading them; writing through ``.data`` leaves it as it is."""
    return [(tensor.data_ptr(), tensor.dtype, tensor._version) for tensor in tensors]


def nbytes(value: object) -> int:
    """Return the bytes of a tensor, or of the tensors in a dataclass."""
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(nbytes, vars(value).values())) if is_dataclass(value) else 0


def _equal(ones: list[Any], others: list[Any]) -> bool:
    return len(ones) == len(others) and all(map(_same, ones, others))


def _same(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)
    return type(one) is type(other) and one == other

"""What is computed once and kept for as long as all that it was made from stays the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor


class Memo:
    """One tensor that is kept; another one takes its place. Copies and pickles start empty.

    Tensors that it was made from are compared by value with copies of them. Neither address nor version of a tensor
    tells whether it changed: writing through ``.data``, as moving averages of weights do, leaves both as they are.
    """

    def __init__(self) -> None:
        self._kept: tuple[Hashable, list[Tensor], Tensor] | None = None

    def __reduce__(self) -> tuple:
        return Memo, ()

    def get(self, make: Callable[[], Tensor], key: Hashable, read: Iterable[Tensor] = ()) -> Tensor:
        """What ``make`` returned for an equal key and equal tensors.

        Inside of a caller's CUDA-graph capture nothing is kept, for nothing is computed before a replay, and tensors
        cannot be compared, for which the host would wait: there, what they decide is computed anew.

        Args:
            make: computes it; without gradient, outside of inference mode: what is kept may serve a training later.
            key: what decides the result beside the tensors.
            read: tensors that decide the result.
        """
        read = list(read)
        capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        kept = None if capturing and read else self._kept
        if kept is not None and kept[0] == key and _equal(kept[1], read):
            return kept[2]
        with torch.inference_mode(False), torch.no_grad():
            made = make()
            if not capturing:
                self._kept = key, [tensor.detach().clone() for tensor in read], made
        return made


def _equal(ones: list[Tensor], others: list[Tensor]) -> bool:
    """Whether tensors have the same dtypes, devices, shapes and values."""
    return len(ones) == len(others) and all(
        (one.dtype, one.device) == (other.dtype, other.device) and torch.equal(one, other)
        for one, other in zip(ones, others, strict=True)
    )

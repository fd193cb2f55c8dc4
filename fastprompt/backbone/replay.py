"""Passes of the text tower on a GPU, recorded once and replayed.

A pass launches hundreds of small kernels, and launching them from Python may take longer than running them. Where every
step has the same shapes, torch records the forward and the backward pass as CUDA graphs of one launch each.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

Pass = Callable[..., Tensor]

RECORDINGS = 2  # each holds the memory of its pass


class Replays:
    """The recordings of one text tower. Copies and pickles start anew."""

    def __init__(self) -> None:
        self._recordings: dict[Hashable, Recording] = {}

    def __reduce__(self) -> tuple:
        return Replays, ()

    def encode(self, encode: Pass, inputs: Sequence[Tensor], constants: Hashable) -> Tensor:
        """Return ``encode(*inputs)``, with gradients replayed; the first ``RECORDINGS`` kinds of passes are recorded.

        Args:
            encode: reads its inputs, constants and frozen weights, and copies nothing from the host.
            inputs: of the pass.
            constants: what else it reads; passes are of one kind if this is the same object and all shapes are equal.
        """
        learned = [x.requires_grad and x.numel() > 0 for x in inputs]
        if not (torch.is_grad_enabled() and any(learned) and _can_record(inputs[0].device)):
            return encode(*inputs)
        key = constants, *((x.shape, x.dtype, needed) for x, needed in zip(inputs, learned, strict=True))
        if key not in self._recordings:
            if len(self._recordings) == RECORDINGS:
                return encode(*inputs)
            samples = (x.detach().clone().requires_grad_(needed) for x, needed in zip(inputs, learned, strict=True))
            self._recordings[key] = Recording(encode, tuple(samples))
        return self._recordings[key](encode, inputs)


class Recording:
    """A forward and a backward pass on memory of their own, which the next forward pass goes over."""

    def __init__(self, encode: Pass, samples: tuple[Tensor, ...]) -> None:
        self._replay = torch.cuda.make_graphed_callables(encode, samples)
        self._turn, self._waiting = 0, None

    def __call__(self, encode: Pass, inputs: Sequence[Tensor]) -> Tensor:
        """Replay the pass, or make it as it is while another one still waits for its backward pass."""
        if self._waiting is not None and self._waiting() is not None:
            return encode(*inputs)
        inputs = [x.view_as(x) for x in inputs]
        for x in inputs:
            if x.requires_grad:  # its gradient, too, stands in memory of the recording
                x.register_hook(lambda grad: None if grad is None else grad.clone())
        output, turn = self._replay(*inputs), self._turn
        self._waiting = weakref.ref(output.grad_fn)  # alive as long as its graph

        def done(_: Tensor) -> None:
            if turn != self._turn:  # what the forward pass has kept is used up, or gone over by the next
                raise RuntimeError("cuda_graphs: expected one backward pass of each pass, got another one")
            self._turn, self._waiting = turn + 1, None

        output.register_hook(done)
        return output.clone()


def _can_record(device: torch.device) -> bool:
    """Return whether this is a GPU, outside of a compilation and of a recording of somebody else."""
    return device.type == "cuda" and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()

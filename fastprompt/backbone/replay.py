"""Passes of the text tower on a GPU, recorded once and replayed.

A pass launches hundreds of small kernels, and launching them from Python may take longer than running them. Shapes and
weights are the same in every step, so the forward and the backward pass are recorded as CUDA graphs (HIP graphs on AMD)
of one launch each.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

log = logging.getLogger(__name__)

Pass = Callable[..., Tensor]

REPEATS = 2  # passes that are alike before the next is recorded
WATCHED = 8  # kinds of passes whose repeats are counted
KEPT = 2  # recordings, each of which holds the memory of its pass
IDLE = 100  # passes after which a recording that served none of them makes room for another


class Recorder:
    """Records what functions launch on a GPU, on a stream of its own and in memory that they share."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream, self._pool = device, torch.cuda.Stream(device), None

    @staticmethod
    def stream(device: torch.device) -> Hashable:
        """The stream that replays would run on now; None if nothing can be recorded: not on a GPU, or inside of a
        recording or a compilation of somebody else.
        """
        if device.type != "cuda" or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
            return None
        return torch.cuda.current_stream(device)

    def warm_up(self, function: Callable[[], Any]) -> None:
        """Compile kernels and prepare libraries: run a function that is not recorded."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            function()
        current.wait_stream(self._stream)

    def record(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """What launches it all again, after the functions that were recorded before, and the result, whose memory
        every replay fills.
        """
        graph = torch.cuda.CUDAGraph()
        # Other threads, which load images, may go on allocating.
        mode = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        # The stream is entered here, too: where a recording fails, older versions of torch do not leave it.
        with torch.cuda.stream(self._stream), torch.cuda.graph(graph, **mode):
            result = function()
        self._pool = graph.pool()
        return graph.replay, result


class Replays:
    """The recordings of one text tower."""

    def __init__(self) -> None:
        self._calls, self._seen, self._lock = 0, {}, Lock()
        self._recordings: dict[Hashable, Recording] = {}
        self._refused = False

    def __reduce__(self) -> tuple:
        return Replays, ()  # copies and pickles start anew

    def encode(
        self,
        encode: Pass,
        inputs: Sequence[Tensor],
        constants: object,
        weights: Iterable[Tensor],
        attention: Hashable,
    ) -> Tensor:
        """``encode(*inputs)``, differentiable once; on a GPU with gradients replayed from the third pass on that is
        alike.

        Args:
            encode: reads its inputs, constants and weights, and copies nothing from the host.
            inputs: of the pass.
            constants: what else it reads, kept alive by it; passes are alike if this is the same object.
            weights: of the tower, which may be moved, to another precision for instance.
            attention: the implementation it attends by, which benchmarks exchange.
        """
        stream = Recorder.stream(inputs[0].device)
        if stream is None or not torch.is_grad_enabled() or not any(map(_learned, inputs)) or _saved_elsewhere():
            return encode(*inputs)
        weights = list(weights)
        if any(weight.requires_grad for weight in weights):  # whose gradients a replay would not give
            return encode(*inputs)
        addresses = tuple(weight.data_ptr() for weight in weights)
        # By its number, which is nobody else's while a recording keeps it: what is merely counted is not kept.
        key = id(constants), stream, addresses, attention, *((x.shape, x.dtype, _learned(x)) for x in inputs)
        with self._lock:
            recording = self._recording(encode, inputs, constants, key)
        return encode(*inputs) if recording is None else _Replayed.apply(recording, encode, *inputs)

    def _recording(self, encode: Pass, inputs: Sequence[Tensor], constants: object, key: Hashable) -> Recording | None:
        self._calls += 1
        if (recording := self._recordings.get(key)) is not None:
            if not recording.overrun:
                recording.last_call = self._calls
                return recording
            # Passes of this kind are several at a time, and making them again costs more than replays save.
            del self._recordings[key]
            self._seen[key] = -math.inf
        if self._refused or not self._repeated(key):
            return None
        if len(self._recordings) == KEPT:
            idle = min(self._recordings, key=lambda old: self._recordings[old].last_call)
            if self._calls - self._recordings[idle].last_call < IDLE:
                return None
            del self._recordings[idle]
        try:
            recording = Recording(encode, inputs, constants, self._calls)
            recording.check(encode)
        except RuntimeError as error:
            log.warning("text passes are launched kernel by kernel: they could not be recorded (%s)", error)
            self._refused = True
            return None
        self._recordings[key] = recording
        return recording

    def _repeated(self, key: Hashable) -> bool:
        self._seen[key] = self._seen.pop(key, 0) + 1  # behind all others
        if len(self._seen) > WATCHED:
            del self._seen[next(iter(self._seen))]
        return self._seen[key] > REPEATS


class Recording:
    """A forward and a backward pass, recorded, on memory of their own.

    It does not keep the pass itself, whose tower keeps the recording: the memory is free when the tower is.

    Attributes:
        last_call: when it served last.
        overrun: whether a pass had to be made again because another one went over its memory.
    """

    def __init__(self, encode: Pass, inputs: Sequence[Tensor], constants: object, call: int) -> None:
        self._constants, self.last_call, self.overrun = constants, call, False
        self._lock, self._turn = Lock(), 0
        recorder = Recorder(inputs[0].device)
        with torch.inference_mode(False), torch.enable_grad():
            self._inputs = [x.detach().clone().requires_grad_(_learned(x)) for x in inputs]
            recorder.warm_up(lambda: self._both(encode, torch.zeros_like))
            self._replay_forward, output = recorder.record(lambda: encode(*self._inputs))
            self._grad = torch.zeros_like(output)
            self._replay_backward, self._grads = recorder.record(lambda: _gradients(output, self._inputs, self._grad))
        self._output = output.detach()

    def _both(self, encode: Pass, grad_like: Callable[[Tensor], Tensor]) -> list[Tensor | None]:
        """Output and gradients of the pass itself, for a gradient made like the output."""
        output = encode(*self._inputs)
        return [output.detach(), *_gradients(output, self._inputs, grad_like(output))]

    def check(self, encode: Pass) -> None:
        """Raise ``RuntimeError`` if a replay differs from the pass itself by more than rounding."""
        grad = torch.linspace(-1, 1, self._output.numel()).to(self._output).view_as(self._output)
        with torch.inference_mode(False), torch.enable_grad():
            expected = self._both(encode, lambda _: grad)
        turn, replayed = self.forward([x.detach() for x in self._inputs])
        pairs = zip(expected, (replayed, *self.backward(turn, encode, self._inputs, grad)), strict=True)
        for own, other in ((own.double(), other.double()) for own, other in pairs if own is not None):
            # What was read from memory that has changed is wrong by far more.
            if not (own - other).norm() <= torch.finfo(self._output.dtype).eps ** 0.5 * own.norm():
                raise RuntimeError("a replay differs from the pass itself")

    def forward(self, inputs: Sequence[Tensor]) -> tuple[int, Tensor]:
        """The turn of this pass, and the output in memory of its own."""
        with self._lock, torch.no_grad():
            self._turn += 1
            for kept, x in zip(self._inputs, inputs, strict=True):
                kept.copy_(x)
            self._replay_forward()
            return self._turn, self._output.clone()

    def backward(self, turn: int, encode: Pass, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
        """Gradients of the inputs of the pass of that turn, in memory of their own, None for those without."""
        with self._lock, torch.no_grad():
            if turn == self._turn:
                self._turn += 1  # what the forward pass has kept is used up
                self._grad.copy_(grad)
                self._replay_backward()
                return [None if own is None else own.clone() for own in self._grads]
        # Another pass has gone over the memory of this one since, so it is made again.
        self.overrun = True
        with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
            inputs = [x.detach().requires_grad_(_learned(own)) for x, own in zip(inputs, self._inputs, strict=True)]
            return _gradients(encode(*inputs), inputs, grad)


class _Replayed(Function):
    @staticmethod
    def forward(ctx: Any, recording: Recording, encode: Pass, *inputs: Tensor) -> Tensor:
        ctx.recording, ctx.encode = recording, encode
        ctx.turn, output = recording.forward(inputs)
        ctx.save_for_backward(*inputs)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.recording.backward(ctx.turn, ctx.encode, ctx.saved_tensors, grad)


def _saved_elsewhere() -> bool:
    """Whether what a pass keeps for its gradients is not simply kept: by activation checkpoints, or on the host."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # torch has no other way to ask


def _learned(x: Tensor) -> bool:
    """Whether it has a gradient; that of no numbers at all is left out."""
    return x.requires_grad and x.numel() > 0


def _gradients(output: Tensor, inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor | None]:
    """Of each input, None for those without."""
    found = iter(torch.autograd.grad(output, [x for x in inputs if x.requires_grad], grad))
    return [next(found) if x.requires_grad else None for x in inputs]

"""Times of calls without what Python takes to launch them, and with it.

On a GPU three times are taken of the same calls: replayed as one CUDA graph, queued while the device sleeps, and by the
host's clock, as a user has them. On a processor there is the last alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Run = Callable[[], object]

ROUNDS = 30
LEAST_ROUNDS = 3
GRAPH_MS = 10.0  # a graph holds calls for about so long, so that its own launch does not count
MOST_CALLS = 64
LONG_MS = 50.0  # what takes longer is not captured: launches are little of it
CLOCK_HZ = 2e9  # at least that of any GPU: a sleep of so many cycles is not shorter than meant


def time_calls(runs: Sequence[Run], device: torch.device, seconds: float, *, graphs: bool = True) -> dict[str, object]:
    """Time calls that compute the same from inputs at different places, in turn, so that no cache holds them all.

    Args:
        runs: they have been called before.
        device: whose work is timed.
        seconds: what the rounds of each clock may take, about.
        graphs: whether a CUDA graph may hold them: where that fails, what the process has loaded is loaded anew.

    Returns:
        ``ms`` (median of one call), ``p20_ms``, ``p80_ms``, ``rounds``, ``timed`` (how), ``wall_ms``; on a GPU
        ``queued_ms``, and of calls up to 50 ms ``graph_ms``, or why they cannot be captured, ``not_captured``.
    """
    wall = _rounds(lambda: _wall(runs, device), seconds)
    if device.type != "cuda":
        return _row(wall, "host clock") | {"wall_ms": _median(wall)}
    runs = list(runs) * min(MOST_CALLS, max(1, math.ceil(GRAPH_MS / max(_median(wall) * len(runs), 1e-3))))
    queued = _rounds(lambda: _queued(runs, device), seconds)
    row = {"wall_ms": _median(wall), "queued_ms": _median(queued)}
    if not graphs or _median(wall) > LONG_MS:
        return _row(queued, "queued behind a sleep") | row

    def all_of_them() -> None:
        for run in runs:
            run()

    try:
        replay = capture(all_of_them, device)[0]
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        return _row(queued, "queued behind a sleep") | row | {"not_captured": reason}
    graph = _rounds(lambda: _events([replay], device, 1e-3) / len(runs), seconds)
    return _row(graph, "graph replays") | row | {"graph_ms": _median(graph)}


def capture(function: Callable[[], object], device: torch.device) -> tuple[Run, object]:
    """What does all of a function again, and its result, whose memory every replay fills.

    On a GPU that is a CUDA graph. On a processor, in rehearsals, the function is called again and its results are
    copied to the same memory.

    Raises:
        RuntimeError: it cannot be captured.
    """
    if device.type != "cuda":
        kept = function()
        return lambda: [own.copy_(new) for own, new in zip(_tensors(kept), _tensors(function()), strict=True)], kept
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # The stream is entered here, too: where a capture fails, older versions of torch do not leave it.
    with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        result = function()
    return graph.replay, result


def _tensors(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _rounds(once: Callable[[], float], seconds: float) -> list[float]:
    """Milliseconds of a call in each round; the first round, which warms up, does not count."""
    once()
    found, end = [], time.perf_counter() + seconds
    while len(found) < LEAST_ROUNDS or (len(found) < ROUNDS and time.perf_counter() < end):
        found.append(once())
    return found


def _wall(runs: Sequence[Run], device: torch.device) -> float:
    begin = time.perf_counter()
    for run in runs:
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - begin) / len(runs)


def _queued(runs: Sequence[Run], device: torch.device) -> float:
    """Time of one call, where the device starts when all calls are queued."""
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for run in runs:
        run()
    to_queue = time.perf_counter() - begin  # too long, if the queue was full and the host had to wait
    return _events(runs, device, to_queue + 1e-3) / len(runs)


def _events(runs: Sequence[Run], device: torch.device, sleep: float) -> float:
    """Milliseconds of all calls by events of the device, which first sleeps for so many seconds (0.2 at the most)."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(int(CLOCK_HZ * min(sleep, 0.2)))  # torch has no public name for it
    start.record()
    for run in runs:
        run()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end)


def _median(values: Sequence[float]) -> float:
    return round(float(np.median(values)), 5)


def _row(values: Sequence[float], timed: str) -> dict[str, object]:
    low, high = np.percentile(values, [20, 80])
    spread = {"p20_ms": round(float(low), 5), "p80_ms": round(float(high), 5)}
    return {"ms": _median(values), **spread, "rounds": len(values), "timed": timed}

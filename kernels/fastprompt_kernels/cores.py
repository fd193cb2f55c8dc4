"""Work on processors: cut into parts, and shared out to the cores."""

import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from queue import Empty, SimpleQueue
from threading import Barrier

import torch
from torch import Tensor


def parts(length: int, at_once: int) -> Iterator[slice]:
    """Cut an axis into parts of about equal length, none longer than at_once, or than 1 if that is less."""
    step = max(1, -(-length // max(1, -(-length // max(1, at_once)))))
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


def on_all_cores(
    function: Callable[..., None],
    tiles: Iterable[tuple],
    device: torch.device,
    scratch: Callable[[], tuple[Tensor, ...]] = tuple,
    little: bool = False,
) -> None:
    """Call the function for every tile; on a processor in one thread a core, each of which computes alone.

    With little to do the calling thread does it: waking others takes longer.

    Torch's own threads would meet in every operation, which costs more than a small tile takes. Scratch memory is
    taken here, because what a thread takes for itself stays with it.
    """
    threads = torch.get_num_threads() if device.type == "cpu" and not little else 1
    waiting, inference = SimpleQueue(), torch.is_inference_mode_enabled()
    for tile in tiles:
        waiting.put(tile)

    def work(memory: tuple[Tensor, ...]) -> None:
        with torch.inference_mode(inference), torch.no_grad():  # these hold for one thread
            while True:
                try:
                    tile = waiting.get_nowait()
                except Empty:
                    return
                function(*tile, *memory)

    # One call a thread, not one a tile: every end of a call wakes the thread that waits for it.
    memory = [scratch() for _ in range(max(1, min(threads, waiting.qsize())))]
    for _ in map(work, memory) if threads == 1 else _cores(threads).map(work, memory):
        pass


def products(left: Tensor, right: Tensor, out: Tensor, beta: int = 0) -> None:
    """Matrix products of images, (B, I, K) and (B, K, J), into or with beta = 1 onto `out` (B, I, J).

    On a processor each is made by one thread. Libraries share a product among threads where there are fewer products
    than threads, and sum in another order then: the result for an image would depend on the size of its batch.
    """

    def fill(images: slice) -> None:
        torch.baddbmm(out[images], left[images], right[images], beta=beta, out=out[images])

    few = left.device.type == "cpu" and len(left) < torch.get_num_threads()
    if few:
        on_all_cores(fill, ((image,) for image in parts(len(left), 1)), left.device)
    else:
        fill(slice(None))


def scratch_memory(count: int, dtype: torch.dtype) -> Tensor:
    """So many numbers, in memory that goes back to the system after use: the C library would keep some of it."""
    names = (
        "MAP_PRIVATE",
        "MAP_ANONYMOUS",
        "MAP_POPULATE",
    )  # none on Windows; the last, all pages at once, on Linux alone
    flags = sum(getattr(mmap, name, 0) for name in names)
    return torch.frombuffer(
        mmap.mmap(-1, max(1, count) * dtype.itemsize, **({"flags": flags} if flags else {})), dtype=dtype
    )


@cache
def _cores(count: int) -> ThreadPoolExecutor:
    """That many threads, each of which computes alone; kept, because the first use of torch in a thread is slow."""
    threads, ready = torch.get_num_threads(), Barrier(count)

    def alone() -> None:
        torch.get_num_threads()  # a thread that asks for the first time takes over what is set for all
        torch.set_num_threads(1)

    pool = ThreadPoolExecutor(count, "fastprompt", alone)
    list(pool.map(lambda _: ready.wait(), range(count)))
    torch.set_num_threads(threads)  # for this thread it still was, but not for those to come
    return pool


if hasattr(os, "register_at_fork"):  # not on Windows, where processes are not forked
    # A process that was forked has the pool, but not its threads.
    os.register_at_fork(after_in_child=_cores.cache_clear)


@contextmanager
def exact_bfloat16_products(inputs: Tensor) -> Iterator[None]:
    """Let the processor's bfloat16 units multiply float32 copies of bfloat16 inputs: nothing is lost, and the sums
    stay in float32. Torch offers no product of bfloat16 matrices with a float32 result on processors.
    """
    settings, before = torch.backends.mkldnn.matmul, torch.backends.mkldnn.matmul.fp32_precision
    if inputs.dtype == torch.bfloat16 and inputs.device.type == "cpu":
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before

"""The cost model of docs/kernels.md and docs/text_encoder.md beside what was measured, line by line."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.found import Found

RESOURCES = Path(__file__).parents[1] / "results" / "kernel_resources.csv"

# Assumed by the pages: products and copies as reported by others, minima from the clock of an H200.
PRODUCT, COPY, CACHE, MINIMA = 790e12, 4.3e12, 5.5e12, 14.8e12
B, P, N, C, D = 128, 196, 4, 1000, 512  # the headline shape
RUNS = {5: 8, 10: 16, 15: 16, 20: 32}  # k of each prompt, and the length of the sorted run
PADDED_P, PADDED_C = 256, 1024
NEAR = 1.1  # times the model, up to which a measurement agrees with it


@dataclass(frozen=True)
class Ceilings:
    """Operations and bytes a second.

    Attributes:
        product: bfloat16 on the tensor cores.
        minima: minima and maxima of float32.
    """

    product: float
    minima: float


ASSUMED = Ceilings(PRODUCT, MINIMA)


@dataclass(frozen=True)
class Line:
    """One statement of the model.

    Attributes:
        what: it is about.
        unit: of the numbers.
        low: the model's number; of a time, if all of it overlaps.
        high: of a time, if nothing overlaps; else the same.
        here: low and high with the ceilings of this machine; None where they were not measured.
        measured: None if it was not, on a GPU.
        more_is_better: of rates.
    """

    what: str
    unit: str
    low: float
    high: float
    here: tuple[float, float] | None
    measured: float | None
    more_is_better: bool = False

    @property
    def ratio(self) -> float | None:
        """Measured over the model, where nothing overlaps."""
        return None if self.measured is None else self.measured / (self.here or (self.low, self.high))[1]

    @property
    def says(self) -> str:
        """What follows."""
        if self.measured is None:
            return "not measured on a GPU"
        low, high = self.here or (self.low, self.high)
        if self.more_is_better:
            agrees = high / NEAR <= self.measured <= high * NEAR
            word = "more" if self.measured > high else "less"
            return "as assumed" if agrees else f"{word} than assumed: the column of this machine counts"
        if self.measured <= low * NEAR:
            return "as fast as the model allows" if self.measured >= low / NEAR else "faster: the model counts too much"
        if self.measured <= high * NEAR:
            hidden = (high - self.measured) / (high - low) if high > low else 0.0
            return f"as modelled; {max(0.0, hidden):.0%} of what could overlap does" if high > low else "as modelled"
        return "slower than one after the other: something that the model leaves out takes the rest"


def lines(found: Found) -> Iterator[Line]:
    """All statements, the ceilings first."""
    product = found.number("TFLOP/s", "environment", "product bfloat16")
    minima = found.number("1e12/s", "environment", "minima")
    copied, read = (found.number("TB/s", "environment", item) for item in ("copy", "second-level cache"))
    for what, unit, assumed, measured in (
        ("bfloat16 product of 8192 x 8192 matrices", "TFLOP/s", PRODUCT / 1e12, product),
        ("copy in device memory, read and written", "TB/s", COPY / 1e12, copied),
        ("reading the second-level cache", "TB/s", CACHE / 1e12, read),
        ("minima and maxima", "1e12/s", MINIMA / 1e12, minima),
    ):
        yield Line(what, unit, assumed, assumed, None, measured, more_is_better=True)
    own = None if product is None or minima is None else Ceilings(1e12 * product, 1e12 * minima)

    def line(what: str, model: Callable[[Ceilings], tuple[float, float]], measured: float | None) -> Line:
        return Line(what, "ms", *model(ASSUMED), None if own is None else model(own), measured)

    headline = {"name": "topk_similarity", "dtype": "bfloat16", "implementation": "fastprompt"}
    both = found.number("ms", "headline", **headline, **{"pass": "forward+backward"})
    yield line(
        "topk_similarity, inference", _forward(False), found.number("ms", "headline", **headline, **{"pass": "forward"})
    )
    yield line("topk_similarity, forward and backward", lambda c: _plus(_forward(True)(c), _backward(c)), both)
    for keep in (False, True):
        for k in (8, 16, 32):
            measured = found.number("ms", "sweep", kernel="forward_kernel", k=k, keep=keep, usual=True)
            yield line(f"forward_kernel, run of {k}{', with bits' * keep}", _kernel(k, keep), measured)
    for kernel, columns in (("grad_patches_kernel", PADDED_P), ("grad_prompts_kernel", 224)):
        measured = found.number("ms", "sweep", kernel=kernel, usual=True)
        yield line(kernel, lambda c, columns=columns: _twice(_product_of(N, columns) / c.product), measured)
    tokens = found.number("tokens", "text", "replays", replays=True) or 8 * 1000 * 3.2
    text = found.number("graph_ms", "text", "replays", replays=False)
    yield line(f"text tower, 8 x 1000 names, {tokens:,.0f} tokens", lambda c: _twice(_text(tokens) / c.product), text)
    step = {"step": "train", "item": "train_step"}
    for what, images in (("fastprompt, images", B), ("fastprompt, cached features", 0)):
        measured = found.number("ms", step["step"], step["item"], implementation=what)

        def of_step(c: Ceilings, images: int = images) -> tuple[float, float]:
            towers = _twice((_text(tokens) + _images(images)) / c.product)
            return _plus(towers, _plus(_forward(True)(c), _backward(c)))

        yield line(f"GalLoP step, {what}", of_step, measured)


def _plus(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    return one[0] + other[0], one[1] + other[1]


def _twice(seconds: float) -> tuple[float, float]:
    """Milliseconds of what has nothing to overlap with."""
    return 1e3 * seconds, 1e3 * seconds


def _product_of(prompts: int, columns: int) -> float:
    """Operations of one product with all images, padding counted in."""
    return 2.0 * D * B * prompts * PADDED_C * columns


def _kernel(run: int, keep: bool) -> Callable[[Ceilings], tuple[float, float]]:
    """One launch of the forward kernel."""

    def model(ceilings: Ceilings) -> tuple[float, float]:
        product = 1e3 * _product_of(1, PADDED_P) / ceilings.product
        selection = 1e3 * B * PADDED_C * PADDED_P * instructions(run, keep) / ceilings.minima
        return max(product, selection), product + selection

    return model


def _forward(keep: bool) -> Callable[[Ceilings], tuple[float, float]]:
    """All four launches."""

    def model(ceilings: Ceilings) -> tuple[float, float]:
        product = 1e3 * _product_of(N, PADDED_P) / ceilings.product
        counted = sum(instructions(run, keep) for run in RUNS.values())
        selection = 1e3 * B * PADDED_C * PADDED_P * counted / ceilings.minima
        return max(product, selection), product + selection

    return model


def _backward(ceilings: Ceilings) -> tuple[float, float]:
    return _twice((_product_of(N, PADDED_P) + _product_of(N, 224)) / ceilings.product)


def _text(tokens: float) -> float:
    """Operations of the linear layers of 12 blocks of width 512, forward and backward."""
    return 12 * 48 * 512.0**2 * tokens


def _images(images: int) -> float:
    """Operations of the linear layers of 12 blocks of width 768 with 197 tokens, forward alone."""
    return 12 * 24 * 768.0**2 * 197 * images


def instructions(run: int, keep: bool) -> float:
    """Instructions an element of the selection, as counted for sm_90 (kernel_resources.csv; its newest row)."""
    wanted = {"kernel": "forward_kernel", "target": "sm_90", "dtype": "bf16", "patches": "256", "k": str(run),
              "keep": str(keep), "scales": "1"}  # fmt: skip
    with RESOURCES.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if all(row[key] == value for key, value in wanted.items())]
    return float([row["per_element"] for row in rows if row["per_element"] and "INDEX" not in row["blocks"]][-1])

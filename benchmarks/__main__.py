"""The command line of the benchmarks: ``python -m benchmarks --help``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm
from tyro.conf import subcommand

from benchmarks import results, text_encoder, topk_similarity
from benchmarks.measure import Benchmark, WrongResultError, measure
from benchmarks.plot import draw_growth
from fastprompt.errors import InputError

DESCRIPTION = """What is fast and by how much: fastprompt beside what the field runs today, in one run.

Results are checked before anything is timed; if one is wrong, there is no time and the exit status is 1.
Implementations take turns, and their ratio is what counts: absolute times depend on the machine and its load.
Peak memory is measured in a fresh process for each. Rows are appended to benchmarks/results/<name>.csv.

A first run: python -m benchmarks topk_similarity --quick

Then: python -m benchmarks plot"""

BENCHMARKS = {module.BENCHMARK.name: module.BENCHMARK for module in (text_encoder, topk_similarity)}


@dataclass(frozen=True)
class Measure:
    """How a benchmark is run."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where everything runs."""

    quick: bool = False
    """Fewer shapes and rounds: a first impression, in a fraction of the time."""

    out: Path = results.FOLDER
    """Folder of the rows."""


@dataclass(frozen=True)
class TextEncoder(Measure):
    """Text features of all classes with gradients to the contexts: encode_prompts beside padded passes.

    The 77-token pass of 4 x 100 prompts needs about 16 GB of memory.
    """


@dataclass(frozen=True)
class TopkSimilarity(Measure):
    """The mean of the k largest patch similarities with gradients: topk_similarity beside eager code."""


@dataclass(frozen=True)
class Plot:
    """Draw how time and memory grow with the number of classes, for every benchmark that has rows."""

    out: Path = results.FOLDER
    """Folder of the rows, and of the pictures."""


Command = (
    Annotated[TextEncoder, subcommand("text_encoder")]
    | Annotated[TopkSimilarity, subcommand("topk_similarity")]
    | Annotated[Plot, subcommand("plot")]
)


def run(benchmark: Benchmark, options: Measure) -> None:
    """Measure one shape after the other; rows are written and a table is printed as soon as a shape is done."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda asked for, but torch sees no CUDA or ROCm device")
    device = torch.device(options.device)
    for shape in tqdm(benchmark.quick_shapes if options.quick else benchmark.shapes, desc="shapes", disable=None):
        measured = measure(benchmark, shape, device, options.quick)
        results.append(options.out / f"{benchmark.name}.csv", benchmark, shape, device, measured)
        tqdm.write(f"\n{results.table(benchmark, shape, measured).to_text()}")


def plot(folder: Path) -> None:
    """Draw every benchmark that has rows."""
    found = [benchmark for benchmark in BENCHMARKS.values() if (folder / f"{benchmark.name}.csv").is_file()]
    if not found:
        raise InputError(f"{folder} has no rows to draw: run one of {', '.join(BENCHMARKS)} first")
    for benchmark in found:
        print("\n".join(map(str, draw_growth(benchmark, folder))))


def main() -> int:
    """Entry point; returns the exit status: 0, 1 for a wrong result, 2 for bad input, 130 after Ctrl-C."""
    command = tyro.cli(
        Command,
        prog="python -m benchmarks",
        description=DESCRIPTION,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        use_underscores=True,
    )
    try:
        match command:
            case TextEncoder():
                run(text_encoder.BENCHMARK, command)
            case TopkSimilarity():
                run(topk_similarity.BENCHMARK, command)
            case Plot(out):
                plot(out)
    except WrongResultError as error:
        print(f"benchmarks: wrong result: {error}", file=sys.stderr)
        return 1
    except InputError as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmarks: interrupted; shapes that were done are in the rows", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The verbs of ``python -m benchmarks`` but for ``gpu``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm
from tyro.conf import subcommand

from benchmarks import (
    break_even,
    call_overhead,
    conditional,
    drop_in,
    method_table,
    patch_statistics,
    results,
    step_profile,
    text_encoder,
    text_memory,
    topk_similarity,
    train_step,
)
from benchmarks.measure import Benchmark, WrongResultError, measure
from benchmarks.plot import draw_growth
from fastprompt.errors import InputError

DESCRIPTION = """What is fast and by how much: fastprompt beside what the field runs today, in one run.

Results are checked before anything is timed; if one is wrong, its shape has no times, the other shapes follow and the
exit status is 1.
Implementations take turns, and their ratio is what counts: absolute times depend on the machine and its load.
Peak memory is measured in a fresh process for each. Rows are appended to benchmarks/results/<name>.csv; what their
columns mean is written in benchmarks/results/README.md.

A first run: python -m benchmarks topk_similarity --quick

A machine with a GPU, for minutes: python -m benchmarks gpu --help

Then: python -m benchmarks plot"""

BENCHMARKS = {
    module.BENCHMARK.name: module.BENCHMARK
    for module in (text_encoder, train_step, conditional, topk_similarity, patch_statistics, call_overhead, drop_in)
}


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

    Padded passes are timed on a part of their sequences, which is checked, and their time is multiplied.
    """

    memory: bool = False
    """Weigh instead: rows in text_encoder_memory.csv, where all passes do the whole work. Needs 20 GB of memory."""


@dataclass(frozen=True)
class TrainStep(Measure):
    """A whole training step of GalLoP beside the computation of its published code, and beside clean PyTorch.

    Peers do a fourth of the step, which is checked against ours and counted four times. Took more than 5 GB of memory.
    """

    profile: bool = False
    """Show instead where the time of our own step goes: rows in train_step_profile.csv, and a picture."""


@dataclass(frozen=True)
class Conditional(Measure):
    """A training step of CoCoOp and CoPL on 32 images at once beside passes image by image; times are for one image.

    The 77-token pass of two images and 100 classes needs about 6 GB of memory.
    """


@dataclass(frozen=True)
class TopkSimilarity(Measure):
    """The mean of the k largest patch similarities, with and without gradients, beside eager and compiled code."""


@dataclass(frozen=True)
class PatchStatistics(Measure):
    """GL-MCM's score, and statistics over the classes with gradients, beside eager and compiled code."""


@dataclass(frozen=True)
class CallOverhead(Measure):
    """What a call costs before any arithmetic: the operators beside plain torch on tiny tensors."""


@dataclass(frozen=True)
class DropIn(Measure):
    """The layers of fastprompt.layers beside what they replace in CoOp's and GalLoP's code."""


@dataclass(frozen=True)
class BreakEven:
    """From which size on the similarity kernels beat the best eager code.

    Appends to break_even.csv, and writes the table break_even-<device>.md anew.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    """Where everything runs."""

    out: Path = results.FOLDER
    """Folder of the rows and of the table."""


@dataclass(frozen=True)
class Methods:
    """Every method on the demo's scenes, three seeds: accuracy on base and new classes, OOD detection, cost of a step.

    Completes methods.csv: delete its rows, or the file, to train anew. Appends to method_steps.csv, and puts the table
    into the page.
    """

    scenes: Path = Path("runs/demo")
    """Folder of the rendered scenes and their features, which are made if they are not there; the demo's is taken."""

    out: Path = results.FOLDER
    """Folder of the rows."""

    page: Path = method_table.PAGE
    """Page with the table."""


@dataclass(frozen=True)
class KernelResources:
    """Compile every Triton kernel that can be launched, for every target; needs no GPU, and 12 minutes on two cores.

    Completes the table of registers, spills, shared memory and instructions, and that of the instructions that have a
    budget, which has rows of every version of Triton it was made with. What they have already is not compiled again.
    """

    counted: bool = False
    """The instructions that have a budget alone, which takes a minute: for another version of Triton."""

    out: Path = results.FOLDER
    """Folder of the tables."""


@dataclass(frozen=True)
class Plot:
    """Draw how time and memory grow with the size of the problem, for every benchmark that has rows to draw."""

    out: Path = results.FOLDER
    """Folder of the rows, and of the pictures."""


Command = (
    Annotated[TextEncoder, subcommand("text_encoder")]
    | Annotated[TrainStep, subcommand("train_step")]
    | Annotated[Conditional, subcommand("conditional")]
    | Annotated[TopkSimilarity, subcommand("topk_similarity")]
    | Annotated[PatchStatistics, subcommand("patch_statistics")]
    | Annotated[CallOverhead, subcommand("call_overhead")]
    | Annotated[DropIn, subcommand("drop_in")]
    | Annotated[BreakEven, subcommand("break_even")]
    | Annotated[Methods, subcommand("methods")]
    | Annotated[KernelResources, subcommand("kernel_resources")]
    | Annotated[Plot, subcommand("plot")]
)


def run(benchmark: Benchmark, options: Measure) -> None:
    """Measure one shape after the other; rows are written and a table is printed as soon as a shape is done.

    Raises:
        WrongResultError: what is wrong in which shapes, once all others are done.
    """
    device = _device(options.device)
    shapes = (benchmark.quick_shapes if options.quick else benchmark.shapes)[device.type]
    wrong = []
    for shape in tqdm(shapes, desc="shapes", disable=None):
        try:
            measured = measure(benchmark, shape, device, options.quick)
        except WrongResultError as error:
            wrong.append(f"{error} ({', '.join(f'{key}={value}' for key, value in shape.items())})")
            continue
        results.append(options.out / f"{benchmark.name}.csv", shape, device, measured.measurements)
        tqdm.write(f"\n{results.table(benchmark, shape, measured).to_text()}")
    if wrong:
        raise WrongResultError("; ".join(wrong))


def weigh(options: TextEncoder) -> None:
    """Weigh the text passes; rows are written and a table is printed after each shape."""
    device, file = _device(options.device), options.out / "text_encoder_memory.csv"
    shapes = text_memory.SHAPES[device.type]
    for shape in tqdm(shapes[:1] if options.quick else shapes, desc="shapes", disable=None):
        memory = text_memory.weigh(shape, device)
        text_memory.write(shape, device, memory, file)
        tqdm.write(f"\n{text_memory.table(shape, memory).to_text()}")


def profile(options: TrainStep) -> None:
    """Profile our training step in every precision; rows are written and a table is printed after each."""
    device, file = _device(options.device), options.out / "train_step_profile.csv"
    shapes = (train_step.BENCHMARK.quick_shapes if options.quick else train_step.PROFILED)[device.type]
    for shape in tqdm(shapes, desc="shapes", disable=None):
        profiles = step_profile.profile(shape, device)
        step_profile.write(shape, device, profiles, file)
        tqdm.write(f"\n{step_profile.table(shape, profiles).to_text()}")
    print("\n".join(map(str, step_profile.draw(file))))


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda asked for, but torch sees no CUDA or ROCm device")
    return torch.device(name)


def plot(folder: Path) -> None:
    """Draw every benchmark that has rows."""
    drawable = [benchmark for benchmark in BENCHMARKS.values() if benchmark.sweeps]
    found = [benchmark for benchmark in drawable if (folder / f"{benchmark.name}.csv").is_file()]
    if not found:
        names = ", ".join(benchmark.name for benchmark in drawable)
        raise InputError(f"{folder} has no rows to draw: run one of {names} first")
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
            case TextEncoder(memory=True):
                weigh(command)
            case TextEncoder():
                run(text_encoder.BENCHMARK, command)
            case TrainStep(profile=True):
                profile(command)
            case TrainStep():
                run(train_step.BENCHMARK, command)
            case Conditional():
                run(conditional.BENCHMARK, command)
            case TopkSimilarity():
                run(topk_similarity.BENCHMARK, command)
            case PatchStatistics():
                run(patch_statistics.BENCHMARK, command)
            case CallOverhead():
                run(call_overhead.BENCHMARK, command)
            case DropIn():
                run(drop_in.BENCHMARK, command)
            case BreakEven(device, out):
                print(break_even.measure_grid(_device(device), out))
            case Methods(scenes, out, page):
                print(method_table.measure_all(scenes, out, page))
            case KernelResources(counted, out):
                from benchmarks import kernel_table  # imports triton

                if not counted:
                    kernel_table.update(out / kernel_table.FILE.name)
                kernel_table.update_counted(out / kernel_table.COUNTED.name)
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

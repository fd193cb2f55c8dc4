"""The steps, most telling first, and how they are run. Only data: it imports nothing that must be installed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """One part of the command, in processes of its own.

    Attributes:
        name: of its module in this folder, whose ``items(plan)`` gives named functions.
        title: what it tells.
        seconds: how long it may take on a GPU while others wait; all together fit into the 8 minutes.
        workers: processes that share its items out: more than one where nothing is timed.
        needs: modules without which it is left out.
    """

    name: str
    title: str
    seconds: int
    workers: int = 1
    needs: tuple[str, ...] = ()


MODELS = ("open_clip", "typeguard")  # what loads them

STEPS = (
    Step("environment", "The machine, and the ceilings of its parts", 30),
    Step("values", "Values and gradients of every Triton kernel, NaN and ties", 70, workers=8),
    Step("capture", "Operators inside of CUDA graphs and of torch.compile", 30),
    Step("headline", "The similarity at its headline shape, beside peers and floors", 55),
    Step("text", "The text tower for 8 x 1000 names, with and without replays", 40, needs=MODELS),
    Step("train", "A training step of GalLoP with 128 images", 50, needs=MODELS),
    Step("profile", "A training step, part by part and kernel by kernel", 30, needs=MODELS),
    Step("overhead", "What a call costs before any arithmetic", 15),
    Step(
        "candidates", "Launch tables: which other tiles, warps and stages compile and compute the same", 40, workers=8
    ),
    Step("sweep", "Launch tables: their times", 30),
    Step("sanitizer", "Memory checks of small shapes by compute-sanitizer", 45),
    Step("suite", "The part of the test suite that is for a GPU", 30, needs=("pytest", "hypothesis")),
    Step("tail", "The other benchmarks and shapes, compiled peers and memory", 5, needs=MODELS),
)


@dataclass(frozen=True)
class Plan:
    """How steps are run.

    Attributes:
        rehearse: on a CPU, with Triton's interpreter and tiny shapes; its times say nothing.
        quick: only a few items of each step.
        out: folder of the results.
    """

    rehearse: bool
    quick: bool
    out: Path

    @property
    def device(self) -> str:
        """Where the steps compute."""
        return "cpu" if self.rehearse else "cuda"

    @property
    def seconds(self) -> float:
        """What the rounds of one timed item take, about."""
        return 0.02 if self.rehearse else 0.4

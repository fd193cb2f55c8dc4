"""What a case of malformed input is, and the commands that cases begin from."""

from collections.abc import Sequence
from dataclasses import dataclass

from tests.fuzz.world import COOP, IMPORT, PHOTO, TRAIN


@dataclass(frozen=True)
class Case:
    """A command line in a spoiled world.

    Attributes:
        arguments: of the command line.
        expects: "refusal", "success" or "either", where what was spoiled may be of no account.
        may_change: what a success may write.
        may_stay: what a refusal may leave: a run that the same command resumes when the cause is mended.
        encoding: of standard output.
        file_size: bytes at which the disk is full.
    """

    arguments: Sequence[str]
    expects: str = "either"
    may_change: Sequence[str] = ("out",)
    may_stay: Sequence[str] = ()
    encoding: str = "utf-8"
    file_size: int | None = None


# What a finished run is used for: all of these work while nothing is spoiled.
USES = (
    Case(["evaluate", "run"]),
    Case(["predict", "run", PHOTO]),
    Case(["explain", "run", PHOTO, "--out", "out.png"], may_change=["out.png"]),
    Case(["words", "run"]),
    Case(["export", "run", "--out", "out.safetensors"], may_change=["out.safetensors"]),
    Case([*COOP, "--out", "run"], may_change=["run"]),
)
RESUME = Case([*COOP, "--out", "unfinished"], may_change=["unfinished"])
FRESH = Case([*COOP, "--out", "out"])
BRING_IN = Case([*IMPORT, "coop.pth.tar"])
BRING_IN_GALLOP = Case([*IMPORT, "gallop.ckpt"])
DESCRIBED = Case(["train", "dualpt", *TRAIN, "--descriptions", "descriptions.json", "--out", "out"])
SPLIT = Case([*COOP, "--split-file", "split.json", "--out", "out"])
COPY = Case(["recipes", "copy", "coop", "default", "out.json"], may_change=["out.json"])
ALL = (*USES, RESUME, FRESH, BRING_IN, BRING_IN_GALLOP, DESCRIBED, SPLIT, COPY)

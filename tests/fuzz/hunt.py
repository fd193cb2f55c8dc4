"""Runs cases of all kinds by turns and counts how they end."""

import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from tests.fuzz.judge import judge
from tests.fuzz.kinds import KINDS
from tests.fuzz.world import copy


@dataclass
class Found:
    """How cases ended, by kind, and what is wrong with some: seed, kind, number and fault of each."""

    counts: dict[str, Counter] = field(default_factory=lambda: {kind: Counter() for kind in KINDS})
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{'kind':22} {'works':>6} {'refuses':>8} {'faults':>7}"]
        total = sum(self.counts.values(), Counter())
        for kind, count in [*self.counts.items(), ("all", total)]:
            lines.append(f"{kind:22} {count['works']:6} {count['refuses']:8} {count['faults']:7}")
        return "\n".join([*lines, *self.faults])


def hunt(template: Path, home: Path, seed: int, numbers: range) -> Found:
    """Run cases, each in a fresh copy of the world; case i is of kind i modulo the number of kinds."""
    found = Found()
    for number in numbers:
        kind = list(KINDS)[number % len(KINDS)]
        copy(template, home)
        case = KINDS[kind](Random(f"{seed} {kind} {number}"), home)
        ended, fault = judge(home, case)
        if case.file_size is not None and ended == "refuses" and not fault:  # nothing is lost: later it works
            _, fault = judge(home, replace(case, file_size=None, expects="success"))
        found.counts[kind]["faults" if fault else ended] += 1
        if fault:
            shown = [argument[:60] for argument in case.arguments]
            found.faults.append(f"seed {seed}, number {number}, {kind}: {shown!a}: {fault}"[:700])
            print(found.faults[-1], file=sys.stderr, flush=True)
    return found

"""The committed tables of what the kernels need: read and completed.

One has every configuration, compiled by one version of Triton; the other the instructions that have a budget, counted
with several versions.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

import triton
from tqdm import tqdm

from benchmarks import results
from benchmarks.kernel_configurations import Configuration, configurations, has_budget, key
from benchmarks.kernel_resources import Resources, survey

FILE = results.FOLDER / "kernel_resources.csv"
COUNTED = results.FOLDER / "kernel_instructions.csv"


def read(file: Path = FILE) -> list[Resources]:
    """The rows of a table.

    Raises:
        InputError: there is no such file.
    """
    return [_row(line) for line in results.read_rows(file)]


def _row(line: Mapping[str, str]) -> Resources:
    kinds = {field.name: field.type if field.type is not bool else "True".__eq__ for field in fields(Resources)}
    return Resources(**{name: kind(line[name]) for name, kind in kinds.items()})


def update(file: Path = FILE) -> None:
    """Compile what the table lacks, and drop what can no longer be launched. Interrupted, it goes on from there."""
    _complete(file, list(configurations()), {key(one) for one in configurations()})


def update_counted(file: Path = COUNTED) -> None:
    """Count the instructions that have a budget with the Triton that is installed; rows of other versions stay.

    Rows of sources that are no more are dropped, whatever their version.
    """
    chosen = [one for one in configurations() if has_budget(one)]
    surveyed = {_row(line).triton for line in results.read_rows(file)} if file.exists() else set()
    _complete(file, chosen, {key(one, version) for one in chosen for version in {*surveyed, triton.__version__}})


def _complete(file: Path, chosen: list[Configuration], valid: set[tuple]) -> None:
    """Keep the rows of valid keys, and add those that the chosen configurations lack with the Triton installed."""
    kept = results.keep_rows(file, lambda line: _row(line).key in valid) if file.exists() else []
    known = {_row(line).key for line in kept}
    missing = [one for one in chosen if key(one) not in known]
    for row in tqdm(survey(missing), total=len(missing), desc="kernels", disable=None):
        results.append_rows(file, [asdict(row)])

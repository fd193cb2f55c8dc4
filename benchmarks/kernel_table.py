"""The committed table of what the kernels need: read and completed."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

from tqdm import tqdm

from benchmarks import results
from benchmarks.kernel_configurations import configurations, key
from benchmarks.kernel_resources import Resources, survey

FILE = results.FOLDER / "kernel_resources.csv"


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
    wanted = {key(one) for one in configurations()}
    kept = results.keep_rows(file, lambda line: _row(line).key in wanted) if file.exists() else []
    known = {_row(line).key for line in kept}
    missing = [one for one in configurations() if key(one) not in known]
    for row in tqdm(survey(missing), total=len(missing), desc="kernels", disable=None):
        results.append_rows(file, [asdict(row)])

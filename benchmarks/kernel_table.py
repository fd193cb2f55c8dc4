"""The committed table of what the kernels need: read, completed, written."""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path

from tqdm import tqdm

from benchmarks.kernel_resources import Row, configurations, key, survey

FILE = Path(__file__).parent / "results" / "kernel_resources.csv"


def read(file: Path = FILE) -> list[Row]:
    """The rows of a table."""
    with file.open(newline="") as handle:
        return [
            Row(**{
                field.name: field.type(text) if field.type is not bool else text == "True"
                for field, text in ((field, line[field.name]) for field in fields(Row))
            })
            for line in csv.DictReader(handle)
        ]  # fmt: skip


def update(file: Path = FILE) -> None:
    """Compile what the table lacks, and drop what can no longer be launched. Interrupted, it goes on from there."""
    known = {row.key: row for row in read(file)} if file.exists() else {}
    present = [known[key(one)] for one in configurations() if key(one) in known]
    missing = [one for one in configurations() if key(one) not in known]

    def rows() -> Iterator[Row]:
        yield from present
        yield from tqdm(survey(missing), total=len(missing), desc="kernels", disable=None)

    _write(rows(), file)


def _write(rows: Iterable[Row], file: Path) -> None:
    """Write a table, each row as soon as it is known."""
    with file.open("w", newline="") as handle:
        table = csv.writer(handle, lineterminator="\n")
        table.writerow([field.name for field in fields(Row)])
        for row in rows:
            table.writerow(asdict(row).values())
            handle.flush()

"""The instrument itself: what it refuses, what it writes, and whether it weighs right."""

import csv

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.measure import Benchmark, Case, Measurement, WrongResultError, check, measure, peak_memory
from benchmarks.results import append, table
from fastprompt.errors import InputError
from tests.benchmarks.workloads import MEGABYTES, build_large, build_waiting

CPU = torch.device("cpu")
SHAPE = {"B": 2, "C": 3}
BENCHMARK = Benchmark("waiting", "Waiting", "float32", build_waiting, (SHAPE,), (SHAPE,), ("B",))


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.tensor([1.0, 2.001]), r"wrong: result 0 is 4\.5e-04 \(relative\) away from that of truth"),
        (torch.tensor([1.0, torch.nan]), "wrong: result 0 is nan"),
        (torch.tensor([[1.0, 2.0]]), "wrong: result 0 has shape"),
    ],
)
def test_a_wrong_result_is_refused(result, message):
    truth = torch.tensor([1.0, 2.0])
    case = Case({"truth": lambda: (truth,), "wrong": lambda: (result,)}, baseline="truth", tolerance=1e-4)
    with pytest.raises(WrongResultError, match=message):
        check(case, CPU)


def test_a_result_within_the_tolerance_is_not_refused():
    truth = torch.tensor([1.0, 2.0])
    case = Case({"truth": lambda: (truth,), "near": lambda: (truth + 1e-6,)}, baseline="truth", tolerance=1e-4)
    assert check(case, CPU) > 0


def test_a_wrong_result_has_no_time_and_exit_status_1(monkeypatch, tmp_path, capsys):
    def wrong(patches, prompts, k):
        return 1.01 * torch.stack([(prompt @ patches.mT).amax(-1) for prompt in prompts], dim=1)

    monkeypatch.setattr("benchmarks.topk_similarity.topk_similarity", wrong)
    monkeypatch.setattr("sys.argv", ["benchmarks", "topk_similarity", "--quick", "--out", str(tmp_path)])
    assert main() == 1
    assert "wrong result: fastprompt: result 0" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_ratio_is_the_time_of_the_baseline_over_the_own(monkeypatch):
    monkeypatch.setattr("benchmarks.measure.SECONDS", 0.5)
    monkeypatch.setattr("benchmarks.measure.peak_memory", lambda *_: None)
    measured = measure(BENCHMARK, SHAPE, CPU)
    assert measured["slow"].ratio == 1
    assert measured["quick"].ratio == measured["slow"].median / measured["quick"].median
    assert 2 < measured["quick"].ratio < 6
    assert measured["quick"].p20 <= measured["quick"].median <= measured["quick"].p80
    assert measured["quick"].baseline == "slow"


def test_peak_memory_sees_what_is_allocated_for_a_moment():
    peak = peak_memory(build_large, SHAPE, CPU, "large")
    if peak is None:
        pytest.skip("peak memory is measured on Linux with glibc only")
    assert 0.8 * MEGABYTES < peak < 1.2 * MEGABYTES


def test_rows_are_appended_and_never_overwritten(tmp_path):
    file = tmp_path / "results" / "waiting.csv"
    first = {"slow": Measurement(80, 79, 81, 3, None, "slow", 1), "quick": Measurement(20, 19, 21, 3, 1.5, "slow", 4)}
    append(file, BENCHMARK, SHAPE, CPU, first)
    before = file.read_text()
    append(file, BENCHMARK, {"B": 2, "C": 5}, CPU, first)
    assert file.read_text().startswith(before)
    rows = list(csv.DictReader(file.open()))
    assert [(row["implementation"], row["C"], row["ratio"]) for row in rows] == [
        ("slow", "3", "1.000"),
        ("quick", "3", "4.000"),
        ("slow", "5", "1.000"),
        ("quick", "5", "4.000"),
    ]
    expected = {
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "dtype": "float32",
        "median_ms": "20.000",
        "p20_ms": "19.000",
        "p80_ms": "21.000",
        "peak_memory_mb": "1.5",
        "baseline": "slow",
    }
    assert {key: rows[1][key] for key in expected} == expected
    assert rows[0]["peak_memory_mb"] == ""


def test_rows_of_other_columns_are_left_alone(tmp_path):
    file = tmp_path / "waiting.csv"
    file.write_text("date,something\n")
    with pytest.raises(InputError, match=r"must have the columns date, device, .*, got date, something"):
        append(file, BENCHMARK, SHAPE, CPU, {})
    assert file.read_text() == "date,something\n"


def test_table_marks_the_fastest():
    text = table(
        BENCHMARK,
        SHAPE,
        {"slow": Measurement(80, 79, 81, 3, 9, "slow", 1), "quick": Measurement(20, 19, 21, 3, 9, "slow", 4)},
    ).to_text()
    assert "4.00*" in text and "20.0*" in text


def test_growth_is_drawn_for_every_device(monkeypatch, tmp_path):
    from benchmarks import __main__ as cli

    monkeypatch.setattr(cli, "BENCHMARKS", {"waiting": BENCHMARK})
    measured = {"slow": Measurement(80, 79, 81, 3, None, "slow", 1), "quick": Measurement(20, 19, 21, 3, 5, "slow", 4)}
    for classes in (3, 30):
        append(tmp_path / "waiting.csv", BENCHMARK, {"B": 2, "C": classes}, CPU, measured)
    monkeypatch.setattr("sys.argv", ["benchmarks", "plot", "--out", str(tmp_path)])
    assert main() == 0
    (picture,) = tmp_path.glob("*.png")
    assert picture.name.startswith("waiting-") and picture.read_bytes().startswith(b"\x89PNG")

"""The instrument itself: what it refuses, what it writes, and whether it weighs right."""

import csv
import platform
from dataclasses import replace
from itertools import product

import pytest
import torch

import benchmarks.command_line as cli
from benchmarks.__main__ import main
from benchmarks.measure import (
    AsRounded,
    Benchmark,
    Case,
    Measured,
    Measurement,
    UnavailableError,
    WrongResultError,
    check,
    measure,
    time_interleaved,
)
from benchmarks.memory import Memory, peak_memory
from benchmarks.results import append, table
from fastprompt.errors import InputError
from tests.benchmarks.workloads import MEGABYTES, RESULT_MEGABYTES, build_killed, build_large, build_waiting

CPU = torch.device("cpu")
SHAPE = {"dtype": "float32", "B": 2, "C": 3}
SHAPES = {"cpu": (SHAPE,), "cuda": (SHAPE,)}
BENCHMARK = Benchmark("waiting", "Waiting", build_waiting, SHAPES, SHAPES, ("quick", "slow"), sweeps=("C",))
SLOW = Measurement(80, 79, 81, 3, None, "slow", 1, 4, 0.1)
SETTING = dict.fromkeys(("date", "device", "threads", "python", "torch", "triton", "fastprompt", "commit"), "")
QUICK = Measurement(20, 19, 21, 3, Memory(1.5, 0.5), "slow", 4, 1, 0.1)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.tensor([1.0, 2.001]), r"wrong: result 0 is 4\.5e-04 \(relative\) away from the truth"),
        (torch.tensor([1.0, torch.nan]), "wrong: result 0 is nan"),
        (torch.tensor([[1.0, 2.0]]), "wrong: result 0 has shape"),
    ],
)
def test_a_wrong_result_is_refused(result, message):
    truth = torch.tensor([1.0, 2.0])
    case = Case({"wrong": lambda: (result,)}, baseline="wrong", truth=lambda: (truth,), tolerance=1e-4)
    with pytest.raises(WrongResultError, match=message):
        check(case)


@pytest.mark.parametrize("truth", [torch.zeros(2), torch.tensor([0.0, torch.nan])])
@pytest.mark.parametrize("tolerance", [1e-4, AsRounded("peer")])
def test_a_truth_without_a_norm_is_refused(truth, tolerance):
    """No relative error can be told: a right result would have the error NaN, and a wrong one allow any other."""
    case = Case({"peer": lambda: (torch.ones(2),)}, baseline="peer", truth=lambda: (truth,), tolerance=tolerance)
    with pytest.raises(WrongResultError, match=r"the truth: result 0 must have a norm above 0, got (0\.0e\+00|nan)"):
        check(case)


@pytest.mark.parametrize(
    ("peer", "got", "refused"),
    [(1.02, 1.039, False), (1.02, 1.041, True), (1.0, 1.007, False), (1.0, 1.009, True), (torch.nan, 1.0, True)],
)
def test_in_low_precision_a_peer_says_how_far_rounding_carries(peer, got, refused):
    """Twice the error of the peer, at least one rounding of bfloat16, 0.0078."""
    runs = {"peer": lambda: (torch.tensor([peer]),), "got": lambda: (torch.tensor([got]),)}
    case = Case(runs, baseline="peer", truth=lambda: (torch.ones(1),), tolerance=AsRounded("peer"))
    if refused:
        with pytest.raises(WrongResultError, match="peer: " if peer != peer else "got: "):
            check(case)
    else:
        assert list(check(case)[0]) == ["peer", "got"]


def test_a_share_of_the_work_has_a_truth_of_its_own_and_is_not_weighed(monkeypatch):
    monkeypatch.setattr("benchmarks.measure.SECONDS", 0.0)
    weighed = []
    monkeypatch.setattr("benchmarks.measure.peak_memory", lambda build, shape, device, name: weighed.append(name))
    whole, part = torch.ones(8, 2), torch.ones(3)
    case = Case(
        {"whole": lambda: (whole,), "part": lambda: (part,)},
        baseline="part",
        truth=lambda: (whole,),
        truth_of_shares=lambda: (part,),
        tolerance=1e-6,
        shares={"part": 5.5},
    )
    measured = measure(replace(BENCHMARK, build=lambda shape, device: case), SHAPE, CPU).measurements
    assert weighed == ["whole"] and measured["part"].memory is None
    with pytest.raises(WrongResultError, match="part: result 0 has shape"):
        check(replace(case, truth_of_shares=None))


def test_what_cannot_run_here_is_left_out_with_its_reason():
    def missing():
        raise UnavailableError("no compiler")

    truth = torch.tensor([1.0, 2.0])
    runs = {"near": lambda: (truth + 1e-6,), "missing": missing}
    first_calls, left_out = check(Case(runs, baseline="near", truth=lambda: (truth,), tolerance=1e-4))
    assert list(first_calls) == ["near"] and first_calls["near"] > 0
    assert left_out == {"missing": "no compiler"}


@pytest.mark.slow
def test_a_wrong_result_has_no_time_and_exit_status_1(monkeypatch, tmp_path, capsys):
    def wrong(patches, prompts, k):
        return 1.01 * torch.stack([(prompt @ patches.mT).amax(-1) for prompt in prompts], dim=1)

    monkeypatch.setattr("benchmarks.topk_similarity.topk_similarity", wrong)
    monkeypatch.setattr("sys.argv", ["benchmarks", "topk_similarity", "--quick", "--out", str(tmp_path)])
    assert main() == 1
    assert "wrong result: fastprompt: result 0" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_wrong_result_does_not_end_the_command(monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.measure.SECONDS", 0.0)
    monkeypatch.setattr("benchmarks.measure.peak_memory", lambda *_: None)
    ones, zeros = (lambda: (torch.ones(2),)), (lambda: (torch.zeros(2),))

    def build(shape, device):
        return Case({"peer": ones if shape["C"] == 3 else zeros}, "peer", ones, 1e-6)

    shapes = {"cpu": ({**SHAPE, "C": 5}, SHAPE, {**SHAPE, "C": 7})}
    with pytest.raises(WrongResultError, match=r"peer: result 0 .* \(.*C=5\); peer: result 0 .* \(.*C=7\)$"):
        cli.run(replace(BENCHMARK, build=build, shapes=shapes), cli.Measure(out=tmp_path))
    assert [row["C"] for row in csv.DictReader((tmp_path / "waiting.csv").open())] == ["3"]


def test_ratios_are_those_of_the_times(monkeypatch):
    monkeypatch.setattr("benchmarks.measure.SECONDS", 0.5)
    monkeypatch.setattr("benchmarks.measure.peak_memory", lambda *_: None)
    measured = measure(BENCHMARK, SHAPE, CPU).measurements
    assert measured["slow"].ratio == 1
    assert measured["quick"].ratio == measured["slow"].median / measured["quick"].median
    assert 2 < measured["quick"].ratio < 6
    assert measured["quick"].p20 <= measured["quick"].median <= measured["quick"].p80
    assert measured["quick"].baseline == "slow"
    floor = measured["floor: high"]
    assert measured["slow"].over_floor == measured["slow"].median / floor.median > 4
    assert measured["floor: low"].median < floor.median and floor.first_call is None


def test_times_are_those_of_a_unit_and_of_the_whole():
    case = replace(build_waiting(SHAPE, CPU), units={"slow": 8}, shares={"quick": 2.5})
    times = time_interleaved(case, CPU, seconds=0.1)
    assert 10 <= min(times["slow"]) < 15 and 50 <= min(times["quick"]) < 75


def test_peak_memory_sees_what_is_allocated_for_a_moment():
    memory = peak_memory(build_large, SHAPE, CPU, "large")
    if memory is None:
        pytest.skip("peak memory is measured on Linux with glibc only")
    assert 0.8 * MEGABYTES < memory.extra < 1.2 * MEGABYTES
    assert 0.8 * RESULT_MEGABYTES < memory.beyond_inputs - memory.extra < 1.2 * RESULT_MEGABYTES


def test_a_process_without_enough_memory_is_reported():
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("peak memory is measured on Linux with glibc only")
    with pytest.raises(InputError, match=r"killed: its process was killed .* too little free memory"):
        peak_memory(build_killed, SHAPE, CPU, "killed")


def test_rows_are_appended_and_never_overwritten(tmp_path):
    file = tmp_path / "results" / "waiting.csv"
    first = {"slow": SLOW, "quick": QUICK}
    append(file, SHAPE, CPU, first)
    before = file.read_text()
    append(file, {**SHAPE, "C": 5}, CPU, first)
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
        "median_ms": "20.0000",
        "p20_ms": "19.0000",
        "p80_ms": "21.0000",
        "peak_memory_mb": "1.5",
        "extra_memory_mb": "0.5",
        "over_floor": "1.000",
        "baseline": "slow",
    }
    assert {key: rows[1][key] for key in expected} == expected
    assert rows[0]["peak_memory_mb"] == ""


def test_rows_of_other_columns_are_left_alone(tmp_path):
    file = tmp_path / "waiting.csv"
    file.write_text("date,something\n")
    with pytest.raises(InputError, match=r"must have the columns date, device, .*, got date, something"):
        append(file, SHAPE, CPU, {"slow": SLOW})
    assert file.read_text() == "date,something\n"


def test_table_marks_the_fastest_which_is_never_a_floor_and_names_what_is_missing():
    floor = replace(QUICK, median=1, memory=None, first_call=None)
    measured = Measured({"slow": SLOW, "quick": QUICK, "floor": floor}, {"compiled": "no compiler"})
    text = table(BENCHMARK, SHAPE, measured).to_text()
    assert "4.00*" in text and "20.000*" in text and "1.000*" not in text
    assert text.endswith("compiled is left out: no compiler")


def _draw(monkeypatch, folder):
    monkeypatch.setattr(cli, "BENCHMARKS", {"waiting": BENCHMARK})
    monkeypatch.setattr("sys.argv", ["benchmarks", "plot", "--out", str(folder)])
    return main()


def test_growth_is_drawn_for_every_device(monkeypatch, tmp_path):
    for device in ("Fast GPU", "Slow CPU"):
        monkeypatch.setattr("benchmarks.results.device_name", lambda _, name=device: name)
        for dtype, classes in product(("float32", "bfloat16"), (3, 30)):
            shape = {**SHAPE, "dtype": dtype, "C": classes}
            append(tmp_path / "waiting.csv", shape, CPU, {"slow": SLOW, "quick": QUICK})
    assert _draw(monkeypatch, tmp_path) == 0
    pictures = {picture.name: picture.read_bytes() for picture in tmp_path.glob("*.png")}
    assert set(pictures) == {
        f"waiting-{device}-{dtype}.png" for device in ("fast-gpu", "slow-cpu") for dtype in ("float32", "bfloat16")
    }
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())


def test_the_newest_rows_count(monkeypatch, tmp_path):
    """Of rows of one shape the last; of several sweeps of equally many values the one whose oldest row is newer."""
    order = ((1, 3, 10), (1, 30, 20), (2, 3, 30), (2, 30, 40), (2, 3, 50), (1, 30, 60))
    for images, classes, median in order:
        row = {"slow": replace(SLOW, median=median)}
        monkeypatch.setattr("benchmarks.results.setting", lambda _, date=median: {**SETTING, "date": f"2026-01-{date}"})
        append(tmp_path / "waiting.csv", {**SHAPE, "B": images, "C": classes}, CPU, row)
    drawn = {}
    monkeypatch.setattr("matplotlib.axes.Axes.plot", _note(drawn))
    assert _draw(monkeypatch, tmp_path) == 0
    assert ([3, 30], [50, 40]) in drawn["slow"]


@pytest.mark.parametrize("memory", [(333, 457), (80, 150), (2, 18), (1, 50), (0, 7), (0, 5000)])
def test_vertical_axes_have_labels_whatever_their_range(memory, monkeypatch, tmp_path):
    for classes, extra in zip((3, 30), memory, strict=True):
        row = {"slow": replace(SLOW, median=extra + 1, p20=extra + 1, p80=extra + 1, memory=Memory(extra, extra))}
        append(tmp_path / "waiting.csv", {**SHAPE, "C": classes}, CPU, row)
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    assert _draw(monkeypatch, tmp_path) == 0
    figures[0].draw_without_rendering()
    for axes in figures[0].axes:
        low, high = axes.get_ylim()
        ticks = [*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks()]
        shown = {tick.label1.get_text() for tick in ticks if low <= tick.get_loc() <= high}
        assert len(shown - {""}) > 1, axes.get_ylabel()


def _note(drawn):
    """A stand-in for plotting that notes what is drawn, by label."""

    def plot(axes, x, y, label, **look):
        drawn.setdefault(label, []).append((list(x), list(y)))

    return plot


def test_what_does_not_vary_alone_is_no_growth(monkeypatch, tmp_path, capsys):
    append(tmp_path / "waiting.csv", {**SHAPE, "B": 1, "C": 3}, CPU, {"slow": SLOW})
    append(tmp_path / "waiting.csv", {**SHAPE, "B": 2, "C": 30}, CPU, {"slow": SLOW})
    assert _draw(monkeypatch, tmp_path) == 2
    assert "has no two rows that differ in C alone" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))

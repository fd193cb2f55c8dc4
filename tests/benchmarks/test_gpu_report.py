"""The page of python -m benchmarks gpu: the model's numbers, what is said of a measurement, and partial results."""

import csv
import json

import pytest

from benchmarks.gpu import model, report, store
from benchmarks.gpu.found import Found
from benchmarks.gpu.plan import STEPS

MEASURED = {"p20_ms": 0.1, "p80_ms": 0.1, "rounds": 3, "timed": "graph replays"}


@pytest.fixture
def out(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps({"rehearse": False, "quick": False, "source": "x"}))
    (tmp_path / "rows").mkdir()
    return tmp_path


def add(out, step, item, *rows, error=None):
    file = store.rows_file(out, step)
    store.append(file, {"item": item, "started": True})
    for row in rows:
        store.append(file, {"item": item, "row": row})
    store.append(file, {"item": item, "seconds": 1.0} | ({"error": error} if error else {}))


def line(out, what):
    (found,) = (one for one in model.lines(Found(out)) if one.what == what)
    return found


def similarity(direction, ms):
    named = {"name": "topk_similarity", "dtype": "bfloat16", "pass": direction, "implementation": "fastprompt"}
    return {**named, "B": 128, "C": 1000, "ms": ms, "wall_ms": 2 * ms, **MEASURED}


def test_the_model_is_that_of_the_pages(out):
    """The table at the end of docs/kernels.md, by hand from its counts, which are those of the newest rows."""
    inference = line(out, "topk_similarity, inference")
    padded = 128 * 4 * 1024 * 256
    assert inference.low == pytest.approx(1e3 * 2 * 512 * padded / 790e12)
    counted = sum(model.instructions(run, False) for run in (8, 16, 16, 32))
    assert inference.high == pytest.approx(inference.low + 1e3 * padded / 4 * counted / 14.8e12)
    assert model.instructions(8, False) < model.instructions(16, False) < model.instructions(16, True)
    both = line(out, "topk_similarity, forward and backward")
    backward = line(out, "grad_patches_kernel").low + line(out, "grad_prompts_kernel").low
    assert f"{backward:.2f}" == "0.33" and both.low > inference.low + backward - 1e-9
    # 8 x 1000 names: 25,600 tokens, 12 blocks of 24 W^2 multiply-adds each.
    (text,) = (one for one in model.lines(Found(out)) if one.what.startswith("text tower"))
    assert text.low == pytest.approx(1e3 * 2 * 24 * 512**2 * 12 * 25600 / 790e12)


def test_without_measurements_nothing_is_said(out):
    assert {one.says for one in model.lines(Found(out))} == {"not measured on a GPU"}
    assert all(one.ratio is None for one in model.lines(Found(out)))


@pytest.mark.parametrize(
    ("times", "said"),
    [(0.5, "faster: the model counts too much"), (1.0, "as fast as the model allows"), (4.0, "slower than one after")],
)
def test_times_beside_the_model(out, times, said):
    inference = line(out, "topk_similarity, inference")
    add(out, "headline", "x", similarity("forward", times * inference.low))
    measured = line(out, "topk_similarity, inference")
    assert measured.says.startswith(said)
    assert measured.ratio == pytest.approx(times * inference.low / inference.high)


def test_a_partial_overlap_says_how_much(out):
    inference = line(out, "topk_similarity, inference")
    add(out, "headline", "x", similarity("forward", inference.high - 0.25 * (inference.high - inference.low)))
    assert line(out, "topk_similarity, inference").says == "as modelled; 25% of what could overlap does"


def test_measured_ceilings_take_the_place_of_assumed_ones(out):
    before = line(out, "grad_patches_kernel")
    add(out, "environment", "product bfloat16", {"TFLOP/s": 395.0, "ms": 1.0})
    add(out, "environment", "minima", {"1e12/s": 7.4, "ms": 1.0})
    after = line(out, "grad_patches_kernel")
    assert after.here == (2 * before.low, 2 * before.high) and after.low == before.low
    product = line(out, "bfloat16 product of 8192 x 8192 matrices")
    assert product.ratio == 0.5 and product.says.startswith("less than assumed")


def test_no_number_of_a_rehearsal_stands_beside_the_model(out):
    (out / "plan.json").write_text(json.dumps({"rehearse": True, "quick": False, "source": "x"}))
    add(out, "environment", "product bfloat16", {"TFLOP/s": 0.1, "ms": 1.0})
    add(out, "headline", "x", similarity("forward", 300.0))
    assert {one.says for one in model.lines(Found(out))} == {"not measured on a GPU"}
    text = report.write(out).read_text()
    assert "**A rehearsal" in text and not (out / "launch_table.csv").exists()


def launches(blocks, ms, usual):
    named = {"kernel": "forward_kernel", "target": "sm_90", "dtype": "bf16", "patches": 196, "k": 16, "keep": True}
    return {**named, "blocks": blocks, "usual": usual, "ms": ms, **MEASURED}


@pytest.mark.parametrize(("ms", "winner"), [(0.09, "BLOCK_C=128"), (0.098, "BLOCK_C=64")])
def test_the_launch_table_has_the_fastest_rows_but_for_noise(out, ms, winner):
    add(out, "sweep", "x", launches("BLOCK_C=64", 0.1, True), launches("BLOCK_C=128", ms, False))
    report.write(out)
    (row,) = csv.DictReader((out / "launch_table.csv").open())
    assert row["blocks"] == winner and row["present_blocks"] == "BLOCK_C=64" and row["tried"] == "2"


def test_a_page_is_drawn_from_any_part_of_the_results(out):
    """One step after the other, with rows of each kind; also of a step that was killed before its first row."""
    rows = {
        "environment": [{"python": "3.12", "packages": {"torch": "2.11", "ftfy": None}, "tools": {"ncu": "/bin/ncu"}}],
        "values": [{"result": "values", "error": 1.0, "allowed": 1e-4, "right": False}],
        "capture": [{"replays": 1, "right": True}],
        "headline": [similarity("forward", 0.3), {**similarity("forward", 0.2), "implementation": "floor: products"}],
        "text": [{"replays": True, "tokens": 25000, "ms": 9.0, "wall_ms": 9.5, "graph_ms": 9.0, **MEASURED}],
        "train": [{"name": "train_step", "implementation": "77 tokens", "left_out": "it does not fit"}],
        "profile": [
            {"features": "cached", "kernel": "all", "ms": 9.0, "launches": 700, "wall_ms": 12.0},
            {"features": "cached", "kernel": "gemm | x", "ms": 3.0, "launches": 70},
        ],
        "overhead": [{**similarity("forward", 0.01), "not_captured": "CUDA error: no"}],
        "sanitizer": [{"tool": "memcheck", "checked": True, "status": 9, "right": False, "tail": "Invalid __global__"}],
        "candidates": [{"part": "x", "blocks": "y", "change": {}, "right": True}],
        "sweep": [launches("BLOCK_C=64", 0.1, True)],
        "suite": [{"status": 0, "passed": 3, "right": True}],
        "tail": [{"name": "drop_in", "dtype": "float32", "implementation": "fastprompt", "median": 1.0, "ratio": 2.0,
                  "over_floor": None}],
    }  # fmt: skip
    assert set(rows) == {step.name for step in STEPS}
    assert "not run" in report.write(out).read_text()
    for name, given in rows.items():
        store.append(store.rows_file(out, name), {"item": "kernels" if name == "profile" else "facts", "started": True})
        report.write(out)
        add(out, name, {"profile": "kernels", "text": "replays"}.get(name, "facts"), *given)
        text = report.write(out).read_text()
    for said in ("values, facts: wrong: result values", "it does not fit", "gemm \\| x", "not captured: CUDA error: no",
                 "missing packages: ftfy", "Invalid \\_\\_global\\_\\_", "with replays", "drop\\_in"):  # fmt: skip
        assert said in text or said.replace("\\", "") in text, said


def test_errors_and_steps_that_were_left_out_are_on_the_page(out):
    add(out, "capture", "graph x", error="RuntimeError: operation not permitted when stream is capturing")
    store.append(
        out / "steps.jsonl", {"step": "text", "status": "left out", "seconds": 0.0, "tail": "open_clip cannot be"}
    )
    ended = {"step": "train", "status": "failed", "seconds": 0.0, "errors": 0, "wrong": 0, "tail": "ImportError: no x"}
    store.append(out / "steps.jsonl", ended)  # before its first item
    text = report.write(out).read_text()
    assert "* train: failed: ImportError: no x" in text
    assert "* capture, graph x: RuntimeError: operation not permitted" in text
    assert "* text: left out: open_clip cannot be" in text


def test_tests_that_failed_are_on_the_page_also_where_the_suite_was_stopped(out):
    for test, outcome in (("test_a", "passed"), ("test_b", "failed")):
        store.append(store.rows_file(out, store.TESTS), {"test": test, "outcome": outcome, "said": "E  CUDA error"})
    text = report.write(out).read_text()
    assert "* suite, test_b: E CUDA error" in text and "test_a" not in text

"""The steps of python -m benchmarks gpu: what they notice, and that a rehearsal of each is right."""

import os
import subprocess
import sys
import time
from importlib import import_module

import pytest
import torch
from fastprompt_kernels import topk_similarity

from benchmarks import step_profile, text_encoder, train_step
from benchmarks.gpu import candidates, capture, cases, command, environment, launches, sanitizer, sweep, tail, values
from benchmarks.gpu.command import main
from benchmarks.gpu.plan import STEPS, Plan
from benchmarks.gpu.processes import ROOT
from benchmarks.gpu.store import items, outcomes
from benchmarks.measure import Case, UnavailableError

CPU = torch.device("cpu")


@pytest.fixture
def plan(tmp_path):
    return Plan(rehearse=True, quick=True, out=tmp_path)


def _case(shape, device):
    truth = torch.ones(3)

    def unavailable():
        raise UnavailableError("not here")

    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory")

    runs = {
        "good": lambda: (truth,), "wrong": lambda: (1.1 * truth,), "missing": unavailable, "large": too_large,
        "part": lambda: (truth,),
    }  # fmt: skip
    return Case(
        runs, "good", lambda: (truth,), 1e-4, floors={"floor": lambda: None}, shares={"part": 4}, units={"part": 2}
    )


def test_one_implementation_that_is_wrong_or_does_not_fit_leaves_the_others(plan, monkeypatch):
    monkeypatch.setattr(cases, "time_calls", lambda calls, **_: [call() for call in calls] and {"ms": 10.0})
    timed = cases.Timed(
        "some", _case, {"dtype": "float32"}, ("good", "wrong", "missing", "large", "part", "floor", "no")
    )
    rows = [row for rows in timed.items(plan).values() for row in rows()]
    found = {row["implementation"]: row for row in rows}
    assert found["good"]["ms"] > 0 and found["floor"]["ms"] > 0 and found["part"]["counted"] == 2.0
    assert found["part"]["ms"] == 20  # a fourth of the work, of two images: its 10 ms count twice
    assert found["wrong"]["wrong"].startswith("wrong: result 0 is 1.0e-01") and "ms" not in found["wrong"]
    assert found["missing"]["left_out"] == "not here" and "does not fit" in found["large"]["left_out"]
    assert found["no"]["left_out"] == "not measured with this shape"


def wrong_rows(found):
    return [row for rows in found for row in rows() if row["right"] is False]


@pytest.mark.parametrize("kind", ["values", "ties"])
def test_a_kernel_that_computes_something_else_is_noticed(plan, monkeypatch, kind):
    def off(patches, prompts, k, impl, **options):
        k = [[scale + 1 for scale in row] for row in k] if impl == "triton" else k
        return topk_similarity(patches, prompts, k, impl="dense" if impl == "triton" else impl, **options)

    chosen = {name: rows for name, rows in values.items(plan).items() if "topk" in name and "NaN" not in name}
    chosen = [rows for name, rows in chosen.items() if ("ties" in name) == (kind == "ties")]

    def right(patches, prompts, k, impl):
        return topk_similarity(patches, prompts, k, impl="dense" if impl == "triton" else impl)

    monkeypatch.setattr(values, "topk_similarity", right)
    assert chosen and not wrong_rows(chosen)
    monkeypatch.setattr(values, "topk_similarity", off)
    assert wrong_rows(chosen)


def test_nan_that_is_swallowed_is_noticed(plan, monkeypatch):
    (rows,) = (rows for name, rows in values.items(plan).items() if name.endswith("NaN"))
    dense = lambda patches, prompts, k, impl: topk_similarity(patches, prompts, k, impl="dense")  # noqa: E731
    monkeypatch.setattr(values, "topk_similarity", dense)
    assert not wrong_rows([rows])
    monkeypatch.setattr(values, "topk_similarity", lambda *args, **kwargs: dense(*args, **kwargs).nan_to_num())
    assert len(wrong_rows([rows])) == 2


def test_an_operator_that_a_graph_does_not_replay_is_noticed(monkeypatch):
    x = torch.ones(2, 3)
    assert not wrong_rows([lambda: capture._graph(lambda x: 2 * x, [x.clone()])])
    monkeypatch.setattr(capture, "capture", lambda function, device: (lambda: None, [t.clone() for t in function()]))
    assert wrong_rows(
        [lambda: capture._graph(lambda x: x * torch.tensor([[1.0], [2.0]]), [torch.arange(6.0).view(2, 3)])]
    )


@pytest.mark.parametrize("part", launches.parts(Plan(True, False, None)), ids=str)
def test_every_change_of_a_launch_table_is_a_row_that_the_kernel_takes(plan, part):
    """Its names are those of the table; the interpreter runs one of them, and the sweep only those that are right."""
    usual = part.usual(CPU, 196)
    assert all(set(change) <= set(usual) for change in part.changes)
    assert part.changed(CPU, 196, {}) == usual


def test_only_rows_that_compute_the_same_are_timed(plan, monkeypatch):
    def found(right):
        return {"part": "forward_kernel k=16 keep", "change": {"num_stages": 3}, "right": right}

    monkeypatch.setattr(sweep.store, "items", lambda out, step: {"x": type("Item", (), {"rows": [found(right)]})})
    monkeypatch.setattr(sweep, "time_calls", lambda calls, device, seconds: {"ms": 1.0})
    (item,) = sweep.items(plan).values()
    for right in (False, True):
        assert [row["usual"] for row in item()] == [True, False][: 1 + right]


def test_a_row_that_computes_something_else_is_noticed(plan, monkeypatch):
    (item,) = candidates.items(plan).values()
    results = iter([(torch.ones(3),), (torch.tensor([1.0, 1.0, 1.1]),)] * 2)
    monkeypatch.setattr(launches.Part, "prepare", lambda self, plan, images: lambda blocks: next(results))
    assert [row["right"] for row in item()] == [False]


def test_a_check_that_leaves_a_process_behind_is_stopped_at_its_limit(tmp_path, monkeypatch):
    """As compute-sanitizer does with the program that it checks: nobody waits for that one's output."""
    tool = tmp_path / "tool"
    tool.write_text("#!/bin/sh\nsleep 30 &\nwait\n")
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizer.shutil, "which", lambda name: str(tool))
    monkeypatch.setattr(sanitizer, "SECONDS", 1)
    begin = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        list(sanitizer.items(Plan(False, True, tmp_path))["memcheck"]())
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("tool", [("sleep", "30"), ("false",), ("no-such-command",)])
def test_a_tool_that_hangs_fails_or_is_not_there_says_nothing(tool, monkeypatch):
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: run(*args, **{**kwargs, "timeout": 0.5}))
    assert environment._said(*tool) is None


def test_the_tail_has_every_shape_for_a_gpu(tmp_path):
    names = list(tail.items(Plan(False, False, tmp_path)))
    shapes = [shape for module in tail.BENCHMARKS for shape in module.BENCHMARK.shapes["cuda"]]
    assert len(names) == len(shapes) > 50


@pytest.fixture
def models(monkeypatch):
    """What a rehearsal puts in the place of large models comes back."""
    for module, names in (
        (text_encoder, ["MODEL"]),
        (train_step, ["MODEL"]),
        (step_profile, ["SECONDS", "STORED", "PICTURE"]),
    ):
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setitem(text_encoder.NAMES, "DTD", text_encoder.NAMES["DTD"])


BY_COMMAND = ("environment", "values", "candidates", "sweep")


@pytest.mark.slow
@pytest.mark.parametrize("step", [step.name for step in STEPS if step.name not in BY_COMMAND])
def test_every_item_of_a_quick_rehearsal_is_right(step, plan, models, monkeypatch):
    """In this process; those below in processes of their own."""
    monkeypatch.setattr("benchmarks.measure.peak_memory", lambda *_: None)
    monkeypatch.setattr("benchmarks.measure.QUICK_SECONDS", 0.1)
    rows = [row for item in import_module(f"benchmarks.gpu.{step}").items(plan).values() for row in item()]
    assert rows and not [row for row in rows if row.get("right") is False or "wrong" in row]
    assert all("left_out" not in row for row in rows)


@pytest.mark.slow
def test_rehearsed_by_the_command(tmp_path):
    """Some steps, each in processes of its own; all of them: ``python -m benchmarks gpu --rehearse``."""
    out = tmp_path / "out"
    assert main(["--rehearse", "--quick", "--minutes", "10", "--out", str(out), "--only", *BY_COMMAND]) == 0
    wrong = {
        name
        for step in BY_COMMAND
        for name, item in items(out, step).items()
        if item.error or not item.finished or any(row.get("right") is False for row in item.rows)
    }
    assert not wrong
    assert set(outcomes(out)) == set(BY_COMMAND)
    assert len(list(items(out, "sweep")["forward_kernel k=16 keep"].rows)) == 2
    assert "not run" in (out / "report.md").read_text() and (tmp_path / "out.zip").exists()


# Where Python looks for packages, those are hidden that a machine with torch and Triton lacks.
HIDING = """
import sys
import time
from importlib.machinery import PathFinder
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = {"tyro", "docstring_parser", "typeguard", *HIDDEN}
        return None if name.partition(".")[0] in hidden else PathFinder.find_spec(name, path, target)
sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.mark.slow
def test_where_little_more_than_torch_and_triton_is_installed(tmp_path):
    (tmp_path / "sitecustomize.py").write_text('HIDDEN = ["open_clip", "ftfy", "wcwidth"]' + HIDING)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [sys.executable, "-m", "benchmarks", "gpu", "--rehearse", "--quick", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*words, "--only", "environment", "overhead", "train"], cwd=ROOT, env={**os.environ, "PYTHONPATH": path},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "Missing here: open_clip_torch, ftfy, wcwidth, typeguard; steps that need them are left out" in done.stderr
    statuses = {name: one["status"] for name, one in outcomes(tmp_path / "out").items()}
    assert statuses == {"environment": "done", "overhead": "done", "train": "left out"}
    assert "left out: open_clip, typeguard cannot be imported here" in (tmp_path / "out" / "report.md").read_text()


def test_without_a_package_that_every_step_needs_nothing_is_begun(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "safetensors" else name)
    assert command.main(["--rehearse", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.endswith("error: no step runs without safetensors\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_no_step_needs_the_packages_of_the_command_line(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("HIDDEN = []" + HIDING)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    modules = ", ".join(f"benchmarks.gpu.{step.name}" for step in STEPS)
    program = f"import {modules}, benchmarks.gpu.report, benchmarks.gpu.runner, sys; assert 'tyro' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, check=True)

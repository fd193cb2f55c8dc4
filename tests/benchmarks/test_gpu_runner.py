"""python -m benchmarks gpu: whatever fails, hangs or is killed, what was done is there and the rest is done."""

import json
import multiprocessing
import os
import signal
import sys
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks.gpu import command, runner, store
from benchmarks.gpu.plan import STEPS, Plan, Step

# The modules of steps, in a folder that is not on the path of the tests. They write down what is really done.
GOOD = """
import os
def items(plan):
    def item(name):
        with open(os.environ["DONE"], "a") as stream:
            stream.write(name + "\\n")
        yield {"value": name}
        yield {"value": name.upper()}
    return {name: lambda name=name: item(f"{__name__} {name}") for name in "abc"}
"""
FAILS = """
def items(plan):
    def bad():
        yield {"value": 1}
        raise ValueError("this item is bad")
    return {"a": lambda: [{"value": 0}], "b": bad, "c": lambda: [{"value": 2}]}
"""
BAD = 'raise ValueError("this item is bad")'
CRASHES = FAILS.replace(BAD, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
HANGS = FAILS.replace(BAD, "import time; print('asleep', flush=True); time.sleep(600)")
SLOW = FAILS.replace(BAD, "import os, time; time.sleep(0 if os.path.exists(os.environ['DONE'] + '.fast') else 600)")
BROKEN = "raise RuntimeError('no such thing')"
# The process that runs the steps is killed while an item is at work, which has written a row.
KILLED = """
import os, signal, time
def items(plan):
    def item():
        yield {"value": 1, "pid": os.getpid()}
        if not os.path.exists(os.environ["DONE"] + ".killed"):
            open(os.environ["DONE"] + ".killed", "w").close()
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(600)
    return {"a": lambda: [{"value": 0}], "b": item, "c": lambda: [{"value": 2}]}
"""


@pytest.fixture
def steps(tmp_path, monkeypatch):
    """Makes modules of steps, and gives what runs them."""
    site = tmp_path / "site"
    (site / "fakes").mkdir(parents=True)
    monkeypatch.setenv("DONE", str(tmp_path / "done.txt"))
    plan = Plan(rehearse=True, quick=False, out=tmp_path / "out")

    def run(*names, seconds=60.0, limits=None, workers=1, again=False, needs=()):
        chosen = [Step(name, name, (limits or {}).get(name, 30), workers, needs) for name in names]
        runner.run_steps(
            chosen, plan, tmp_path / "out.zip", seconds=seconds, again=again, site=site, package="fakes",
            say=lambda text: None,
        )  # fmt: skip
        return {name: one["status"] for name, one in store.outcomes(plan.out).items()}

    def make(**modules):
        for name, text in modules.items():
            (site / "fakes" / f"{name}.py").write_text(text)
        return run

    make.out, make.pack, make.done = plan.out, tmp_path / "out.zip", tmp_path / "done.txt"
    return make


def values(out, step):
    return {name: [row["value"] for row in item.rows] for name, item in store.items(out, step).items()}


def test_what_fails_crashes_or_hangs_is_written_down_and_the_next_goes_on(steps):
    run = steps(fails=FAILS, crashes=CRASHES, hangs=HANGS, broken=BROKEN, good=GOOD, other=GOOD)
    statuses = run("fails", "crashes", "broken", "good")
    assert statuses == {"fails": "failed", "crashes": "failed", "broken": "failed", "good": "done"}
    for step, error in (("fails", "ValueError: this item is bad"), ("crashes", "its process ended with status -9")):
        assert values(steps.out, step) == {"a": [0], "b": [1], "c": [2]}
        found = store.items(steps.out, step)
        assert found["b"].error.startswith(error) and found["a"].error is found["c"].error is None
    assert "no such thing" in store.outcomes(steps.out)["broken"]["tail"]
    before = time.monotonic()
    assert run("hangs", "fails", "good", "other", limits={"hangs": 5}, seconds=65)["hangs"] == "out of time"
    assert time.monotonic() - before < 30
    assert values(steps.out, "hangs") == {"a": [0], "b": [1]}
    assert store.items(steps.out, "hangs")["b"].error == "the step was out of time: asleep"
    with zipfile.ZipFile(steps.pack) as archive:
        assert {"steps.jsonl", "rows/good.jsonl", "logs/hangs.txt"} <= set(archive.namelist())


def test_a_step_that_hung_goes_on_and_the_bad_item_is_tried_again_where_it_is_asked_for(steps):
    run = steps(hangs=HANGS, good=GOOD)
    run("hangs", "good", limits={"hangs": 5}, seconds=35)
    assert list(values(steps.out, "hangs")) == ["a", "b"]
    assert run("hangs", "good") == {"hangs": "failed", "good": "done"}
    assert values(steps.out, "hangs") == {"a": [0], "b": [1], "c": [2]}
    steps(hangs=FAILS)
    assert run("hangs", again=True) == {"hangs": "failed", "good": "done"}
    assert values(steps.out, "hangs") == {"a": [0], "b": [1], "c": [2]}
    begun = [line["item"] for line in store.lines(store.rows_file(steps.out, "hangs")) if "started" in line]
    assert begun == ["a", "b", "c", "b"]


def test_limits_fit_into_the_minutes_and_grow_where_fewer_steps_share_them(steps, monkeypatch):
    assert sum(step.seconds for step in STEPS) < 480
    given, outcome = [], {"status": "done", "seconds": 0, "items": 0, "errors": 0, "wrong": 0}
    monkeypatch.setattr(runner.time, "monotonic", lambda: 1000.0)

    def ran(step, plan, deadline, stopped, site, module):
        given.append((deadline - 1000, stopped))
        return {"step": step.name, **outcome}

    monkeypatch.setattr(runner, "_run", ran)
    run = steps(one=GOOD)
    run("one", "two", "three", limits={"one": 10, "two": 20}, seconds=60)
    assert given == [(10, "out of time"), (20, "out of time"), (60, "cut short")]
    given.clear()
    run("one", "four", "five", limits={"four": 10}, seconds=80)  # the first is done
    assert given == [(20, "out of time"), (80, "cut short")]


def test_workers_share_the_items_out(steps):
    run = steps(good=GOOD)
    assert run("good", workers=2) == {"good": "done"}
    assert sorted(steps.done.read_text().split("\n")[:-1]) == ["fakes.good a", "fakes.good b", "fakes.good c"]


def test_what_does_not_fit_into_the_minutes_is_done_by_the_next_call(steps, monkeypatch):
    monkeypatch.setattr(runner, "LEAST", 0.5)
    run = steps(good=GOOD, slow=SLOW, other=GOOD)
    assert run("good", "slow", "other", seconds=4) == {"good": "done", "slow": "cut short"}
    assert values(steps.out, "slow") == {"a": [0], "b": [1]}
    steps.done.with_name("done.txt.fast").touch()
    assert run("good", "slow", "other") == {"good": "done", "slow": "done", "other": "done"}
    assert values(steps.out, "slow") == {"a": [0], "b": [1], "c": [2]}
    assert steps.done.read_text().split("\n")[:-1].count("fakes.good a") == 1


def test_without_a_package_a_step_is_left_out(steps):
    run = steps(good=GOOD)
    assert run("good", needs=("no_such_package",)) == {"good": "left out"}
    assert "no_such_package cannot be imported here" in store.outcomes(steps.out)["good"]["tail"]
    assert not steps.done.exists()


def test_a_kill_while_an_item_is_at_work_leaves_no_process_and_loses_nothing(steps):
    run = steps(killed=KILLED, good=GOOD)
    process = multiprocessing.get_context("fork").Process(target=run, args=("good", "killed"))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (row,) = store.items(steps.out, "killed")["b"].rows
    deadline = time.monotonic() + 10
    while _alive(row["pid"]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(row["pid"]) or sys.platform != "linux"
    assert values(steps.out, "killed") == {"a": [0], "b": [1]}
    assert run("good", "killed") == {"good": "done", "killed": "done"}
    assert values(steps.out, "killed") == {"a": [0], "b": [1], "c": [2]}
    assert steps.done.read_text().split("\n")[:-1] == ["fakes.good a", "fakes.good b", "fakes.good c"]


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_write_of_the_results_loses_nothing(steps, after):
    """Of the process that runs the steps, before and after each of its writes to the disk."""
    run = steps(good=GOOD, fails=FAILS)

    def killed(at):
        real, count = os.fsync, 0

        def fsync(number):
            nonlocal count
            count += 1
            if count == at and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            real(number)
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = fsync
        run("good", "fails")

    for at in range(1, 50):
        process = multiprocessing.get_context("fork").Process(target=killed, args=(at,))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        if steps.pack.exists():
            with zipfile.ZipFile(steps.pack) as archive:
                assert archive.testzip() is None
        assert run("good", "fails") == {"good": "done", "fails": "failed"}
        assert values(steps.out, "good") == {
            name: [f"fakes.good {name}", f"FAKES.GOOD {name.upper()}"] for name in "abc"
        }
        assert steps.done.read_text().count("\n") == 3  # nothing that was done is done again
        for file in (*steps.out.rglob("*.jsonl"), steps.done):
            file.unlink()
    assert at > 4  # a line for each step, and a packed file with its folder


def test_a_line_that_a_kill_tore_is_left_out_and_the_next_one_is_whole(tmp_path):
    file = tmp_path / "rows.jsonl"
    store.append(file, {"item": "a", "started": True})
    file.write_bytes(file.read_bytes() + b'{"item": "a", "ro')
    store.append(file, {"item": "a", "started": True})
    assert list(store.lines(file)) == [{"item": "a", "started": True}] * 2


def test_results_of_other_code_or_of_a_rehearsal_are_not_mixed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runner, "run_steps", lambda *_, **__: (tmp_path / "rows").mkdir(exist_ok=True))
    arguments = ["--rehearse", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    assert command.main([*arguments, "--quick"]) == 2
    assert "expected results of the same code and options" in capsys.readouterr().err
    own = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**own, "source": "other"}))
    assert command.main(arguments) == 2 and "(source)" in capsys.readouterr().err


def test_bad_options_are_refused_in_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    cases = {
        "expected a CUDA or ROCm device, but torch sees none: --rehearse": [],
        "--minutes: expected a number above 0, got 0.0": ["--minutes", "0"],
        "--wheels: expected a folder of wheels, got": ["--wheels", str(tmp_path)],
        "--out: expected a folder with results of 'python -m benchmarks gpu'": ["--report"],
    }
    for sentence, options in cases.items():
        assert command.main(["--out", str(tmp_path / "out"), *options]) == 2
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1


def test_wheels_are_unpacked_for_the_steps_and_missing_packages_named(steps, tmp_path, monkeypatch):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "some_package-1-py3-none-any.whl", "w") as archive:
        archive.writestr(
            "some_package/__init__.py", "import pathlib\nTEXT = pathlib.Path(__file__).with_name('t').read_text()"
        )
        archive.writestr("some_package/t", "from a file of the package")
    with zipfile.ZipFile(wheels / "torch-9-cp312-none-any.whl", "w") as archive:
        archive.writestr("torch/__init__.py", "")
    monkeypatch.setattr(command, "PACKAGES", {"some_package": "some-package", "torch": "torch"})
    monkeypatch.setattr(command.metadata, "version", lambda name: "2.11.0+cu130")
    assert "Missing here: some-package;" in command.missing()
    assert "-d wheels torch==2.11.0 some-package'" in command.missing()
    site = command.unpack(wheels, tmp_path / "site")
    assert not (site / "torch").exists()
    monkeypatch.syspath_prepend(str(site))
    assert command.missing() == ""
    steps(uses="import some_package\ndef items(plan):\n    return {'a': lambda: [{'value': some_package.TEXT}]}")(
        "uses", needs=("some_package",)
    )
    assert values(steps.out, "uses") == {"a": ["from a file of the package"]}

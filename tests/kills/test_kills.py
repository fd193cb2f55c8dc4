"""Kill -9 before every operation on files, and in the middle of every write: the same command ends as if unharmed."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer

from fastprompt.backbone import load_backbone
from tests.exchange.conftest import save_dassl
from tests.experiment.conftest import COLOURS, model_folder, write_images  # noqa: F401

ROOT = Path(__file__).parents[2]
CLOCK = ("seconds", "images_per_second", "peak_memory_bytes")
KILLED = -9


class World:
    """A folder with data, a model and a checkpoint, and commands that run in its subfolder "work"."""

    def __init__(self, root, model_folder, server):  # noqa: F811
        self.root, self.work, self.server = root, root / "work", server
        write_images(root / "photos" / "train", COLOURS, 3)
        write_images(root / "photos" / "test", COLOURS, 2, seed=1)
        backbone = load_backbone(f"local-dir:{model_folder}", device="cpu")
        prompts = [f"X X X X {name.replace('_', ' ')}." for name in sorted(COLOURS)]
        tokens = SimpleTokenizer()(prompts, context_length=77)
        embedded = backbone.model.token_embedding(tokens).detach().half()
        buffers = {"token_prefix": embedded[:, :1], "token_suffix": embedded[:, 5:]}
        save_dassl(root / "checkpoint", {"ctx": torch.ones(4, 48)}, buffers)
        (root / "names").write_text("\n".join(sorted(COLOURS)))
        model = ["--backbone", f"local-dir:{model_folder}"]
        cache = ["--cache-dir", "cache", "--image-batch", "4"]
        self.train = ["train", "coop", str(root / "photos"), *model, *cache, "--shots", "0", "--batch-size", "8"]
        self.commands = {
            "train": [*self.train, "--epochs", "2", "--out", "runs/run"],
            "views": [*self.train, "--epochs", "1", "--augment", "--views", "2", "--out", "run"],
            "import": [
                "import",
                str(root / "checkpoint"),
                *model,
                "--class-names",
                str(root / "names"),
                "--out",
                "in/run",
            ],
            "cache": ["evaluate", "run", *cache],
            "patches": ["evaluate", "run", *cache, "--ood", str(root / "photos" / "test")],
            "head": ["export", "run", "--out", "out/head.safetensors"],
            "onnx": ["export", "run", "--out", "out/classifier.onnx"],
        }

    def reset(self, name):
        """An empty working folder; with an imported run where the command takes one."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        if name in ("cache", "patches", "head", "onnx"):
            if not (self.root / "imported").exists():
                given = [*self.commands["import"][:-1], "run"]
                given = [*given[:4], "--data", str(self.root / "photos"), *given[6:]]
                (done,) = self.run({"command": given})
                assert done["status"] == 0, done
                shutil.copytree(self.work / "run", self.root / "imported")
            else:
                shutil.copytree(self.root / "imported", self.work / "run")
        if name == "patches":  # pooled features are there, and are extended
            (done,) = self.run({"command": self.commands["cache"]})
            assert done["status"] == 0 and list(self.work.glob("cache/*/pooled-*")), done
            assert not list(self.work.glob("cache/*/patches-*"))

    def run(self, *jobs):
        jobs = [{"cwd": str(self.work), **job} for job in jobs]
        self.server.stdin.write(json.dumps(jobs) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def result(self):
        """Every file that a command left, by name: its bytes, without what the clock says."""
        files = {}
        for path in sorted(self.work.rglob("*")):
            name = str(path.relative_to(self.work))
            files[name] = None if path.is_dir() else path.read_bytes()
            if path.name == "metrics.jsonl":
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                files[name] = [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]
            if path.name == "environment.json":
                files[name] = sorted(json.loads(path.read_text()))
        return files


@pytest.fixture(scope="module")
def world(tmp_path_factory, model_folder):  # noqa: F811
    root = tmp_path_factory.mktemp("world")
    command = [sys.executable, "-m", "tests.kills.server", str(tmp_path_factory.mktemp("scratch"))]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    yield World(root, model_folder, server)
    server.stdin.close()
    server.wait()


def unharmed(world, name, half):
    """What the command leaves, and the operations that it does."""
    world.reset(name)
    (done,) = world.run({"command": world.commands[name], "half": half})
    assert done["status"] == 0, done["stderr"]
    return world.result(), done["operations"]


def kill_and_repeat(world, name, half, kills, expected):
    """Kill the command at each of these operations in turn, then let it end."""
    world.reset(name)
    command = world.commands[name]
    for number, kill in enumerate(kills):
        (killed,) = world.run({"command": command, "kill": kill, "half": half})
        ends = (KILLED, 0) if number else (KILLED,)  # a repetition has less left to do
        assert killed["status"] in ends, (name, kill, killed["stderr"])
    (done,) = world.run({"command": command})
    assert done["status"] == 0, (name, kills, done["stderr"])
    assert "last bits" not in done["stderr"]
    found = world.result()
    assert found.keys() == expected.keys(), (name, kills)
    assert [file for file in expected if found[file] != expected[file]] == [], (name, kills)


@pytest.mark.torture
@pytest.mark.parametrize("half", [False, True], ids=["before operations", "in writes"])
@pytest.mark.parametrize("name", ["train", "views", "import", "cache", "patches", "head", "onnx"])
def test_every_kill(name, half, world):
    expected, operations = unharmed(world, name, half)
    assert len(operations) >= (1 if half else 4), operations
    for kill in range(1, len(operations) + 1):
        kill_and_repeat(world, name, half, [kill], expected)
    print(f"{name}: killed {'in' if half else 'before'} {len(operations)} {'writes' if half else 'operations'}")


@pytest.mark.torture
def test_kills_of_what_was_killed_before(world):
    draw = random.Random(0)
    expected, operations = unharmed(world, "train", False)
    for _ in range(30):
        kill_and_repeat(world, "train", False, [draw.randint(1, len(operations)) for _ in range(3)], expected)


def few(operations):
    """Five operations that lie evenly apart, or all of fewer."""
    last = len(operations)
    return sorted({1 + place * (last - 1) // 4 for place in range(5)})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "import", "cache", "patches", "head"])
def test_some_kills(name, world):
    for half in (False, True):
        expected, operations = unharmed(world, name, half)
        for kill in few(operations):
            kill_and_repeat(world, name, half, [kill], expected)


def check_two_on_a_run(world, seeds, delay):
    """One of two commands at once trains, the other names it and does nothing."""
    commands = [[*world.train, "--epochs", "60", "--seed", seed, "--out", "run"] for seed in seeds]
    world.reset("train")
    outcomes = world.run({"command": commands[0]}, {"command": commands[1], "delay": delay})
    statuses = sorted(outcome["status"] for outcome in outcomes)
    assert statuses == [0, 2], outcomes
    trained, refused = sorted(outcomes, key=lambda outcome: outcome["status"])
    other = f"but process {trained['pid']} on "
    assert other in refused["stderr"] or "holds a run with seed" in refused["stderr"], refused["stderr"]
    found = world.result()
    world.reset("train")
    (alone,) = world.run({"command": commands[outcomes.index(trained)]})
    assert alone["status"] == 0 and world.result() == found


def check_two_on_a_cache(world, delay):
    """Both train: one encodes, the other waits for it or finds it done."""
    commands = [[*world.train, "--epochs", "2", "--seed", seed, "--out", f"run{seed}"] for seed in "12"]
    world.reset("train")
    outcomes = world.run({"command": commands[0]}, {"command": commands[1], "delay": delay})
    assert [outcome["status"] for outcome in outcomes] == [0, 0], outcomes
    found, waited = world.result(), [outcome for outcome in outcomes if "waiting for process " in outcome["stderr"]]
    for late in waited:
        (first,) = (outcome for outcome in outcomes if outcome is not late)
        assert f"waiting for process {first['pid']} on " in late["stderr"]
    world.reset("train")
    for command in commands:
        assert world.run({"command": command})[0]["status"] == 0
    assert world.result() == found  # so nothing was encoded twice
    return bool(waited)


@pytest.mark.slow
def test_two_processes_at_once(world):
    for seeds in ("11", "12"):
        check_two_on_a_run(world, seeds, 0)
    check_two_on_a_cache(world, 0)


@pytest.mark.torture
def test_two_processes_at_once_20_times(world):
    draw, waited = random.Random(0), 0
    for _ in range(20):
        check_two_on_a_run(world, draw.choice(["11", "12"]), draw.uniform(0, 0.3))
        waited += check_two_on_a_cache(world, draw.uniform(0, 0.3))
    print(f"two processes: 20 of 20 on a run, 20 of 20 on a cache, where one waited {waited} times")
    assert waited

"""Malformed input of every kind gets one sentence and status 2, or works: no traceback, no hang, nothing executed.

Counts are printed: ``pytest -rP tests/fuzz``; ``python -m tests.fuzz`` runs cases by hand.
"""

import pickle
import shutil
from contextlib import suppress
from dataclasses import replace

import pytest

from tests.fuzz import checkpoints
from tests.fuzz.case import ALL
from tests.fuzz.hunt import hunt
from tests.fuzz.judge import judge
from tests.fuzz.kinds import KINDS
from tests.fuzz.world import build, copy

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch, about the odd tensors that cases are made with


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The world as it was built, and the one place where copies of it are used."""
    folder = tmp_path_factory.mktemp("fuzz")
    home = folder / "world"
    home.mkdir()
    build(home)
    shutil.copytree(home, folder / "template")
    return folder / "template", home


@pytest.mark.slow
def test_every_command_works_while_nothing_is_spoiled(world):
    template, home = world
    for case in ALL:
        copy(template, home)
        assert judge(home, replace(case, expects="success")) == ("works", None)


@pytest.mark.parametrize("made", checkpoints.TRACED)
def test_a_payload_that_is_executed_leaves_a_trace(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints.set_traps(tmp_path)
    with suppress(RuntimeError):  # torch.hub finds no model, after it has executed the file
        waited = pickle.loads(pickle.dumps(made()))  # noqa: S301 (ours)
        getattr(waited, "wait", str)()
    assert (tmp_path / "canary").exists()


@pytest.mark.slow
def test_two_cases_of_every_kind(world):
    found = hunt(*world, seed=1, numbers=range(2 * len(KINDS)))
    print(found)
    assert not found.faults


@pytest.mark.torture
@pytest.mark.parametrize("seed", [1, 2])
def test_a_thousand_cases_of_all_kinds(world, seed):
    found = hunt(*world, seed=seed, numbers=range(1000))
    print(found)
    assert not found.faults

"""The training step and its peers: one computation, of which the peers do a share; and the profile of our own."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import step_profile, train_step, train_step_peers
from benchmarks.measure import WrongResultError, check
from benchmarks.results import read_rows
from fastprompt.report.style import new_figure
from tests.models import TEXT, VIT, make_backbone, make_clip

CPU = torch.device("cpu")
SHAPE = {"dtype": "float32", "B": 4, "C": 5, "names": "DTD", "share": 2}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(train_step, "load_backbone", lambda *_, **__: make_backbone(make_clip().float()))
    monkeypatch.setitem(train_step.NAMES, "DTD", ("banded", "polka-dotted", "lined", "crosshatched", "grid"))


def _case(share):
    """All but the compiled peer."""
    case = train_step.build({**SHAPE, "share": share}, CPU)
    chosen = {name: run for name, run in case.implementations.items() if name != train_step.COMPILED}
    return replace(case, implementations=chosen)


@pytest.mark.parametrize("share", [1, 2, 4])
def test_a_share_of_the_step_has_the_results_of_the_whole(share):
    case = _case(share)
    first_calls, left_out = check(case)
    assert len(first_calls) == 5 and not left_out
    counted = {name: case.shares.get(name, 1) for name in case.implementations}
    whole = {train_step.IMAGES, train_step.CACHED}
    assert counted == {name: 1 if name in whole else share for name in first_calls}


def test_every_call_computes_the_same():
    for run in _case(share=2).implementations.values():
        first = [tensor.clone() for tensor in run()]
        for one, again in zip(first, run(), strict=True):
            torch.testing.assert_close(one, again, rtol=0, atol=0)


@pytest.mark.parametrize("wrong", ["value path", "a prompt"])
def test_a_wrong_step_is_found(monkeypatch, wrong):
    if wrong == "value path":
        monkeypatch.setattr(train_step_peers, "value_path", lambda block, x: block(x))
    else:
        real = train_step.GalLoP.encode_text
        monkeypatch.setattr(train_step.GalLoP, "encode_text", lambda self: real(self).roll(1, dims=0))
    with pytest.raises(WrongResultError):
        check(_case(share=2))


@pytest.mark.parametrize(("tower", "layers", "width"), [("text", 3, TEXT["width"]), ("image", 2, VIT["width"])])
def test_the_published_towers_do_what_nobody_reads(tower, layers, width):
    """Beside 12 products of W x W a token and block, 14 more; the clean image tower has 10 more in its last block."""
    model = make_clip().float()
    blocks = model.transformer.resblocks if tower == "text" else model.visual.transformer.resblocks
    tokens, flops = torch.randn(2, 7, width), []
    for transformer in (train_step_peers.clean_transformer, train_step_peers.published_transformer):
        with FlopCounterMode(display=False) as counter:
            transformer(blocks, tokens.requires_grad_(), None)
        flops.append(counter.get_total_flops())
    assert flops[1] - flops[0] == (14 * layers - 10) * 2 * 14 * width**2


def test_seams_come_in_the_order_of_a_step():
    """The text encoder's backward pass is last, so that a hook on its result parts it from all else."""
    work, marks = train_step.workload(SHAPE, CPU), []
    step = step_profile._Step(work, lambda: work.images)
    step.run(marks.append)
    assert marks == ["start", *step_profile.PARTS]


def test_a_profile_is_written_and_drawn(monkeypatch, tmp_path):
    for name, value in {"STORED": 4, "PICTURE": (40, 50), "SECONDS": 0.0}.items():
        monkeypatch.setattr(step_profile, name, value)
    profiles = step_profile.profile(SHAPE, CPU)
    assert [one.features for one in profiles] == ["images", "cached features"]
    assert profiles[1].parts["image tower"] < profiles[0].parts["image tower"]
    file = tmp_path / "train_step_profile.csv"
    step_profile.write(SHAPE, CPU, profiles, file)
    rows = read_rows(file)
    assert list(rows[0])[-4:] == ["features", "part", "median_ms", "share"]
    assert [row["part"] for row in rows] == [*step_profile.PARTS, "step"] * 2
    assert float(rows[8]["median_ms"]) == pytest.approx(profiles[0].step, abs=1e-3)
    assert sum(float(row["share"]) for row in rows[:8]) == pytest.approx(profiles[0].explained, abs=1e-3)
    (picture,) = step_profile.draw(file)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "explained" in step_profile.table(SHAPE, profiles).to_text()

    drawn = []
    monkeypatch.setattr(step_profile, "_figure", lambda title, bars: drawn.append(bars) or new_figure(1, 1))
    step_profile.write(SHAPE, CPU, [replace(one, step=1e6) for one in profiles], file)
    step_profile.draw(file)
    assert [bar["step"] for bar in drawn[0].values()] == [1e6, 1e6]  # of equal bars the newest rows

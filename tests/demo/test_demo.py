"""The demo end to end, on fewer pictures and epochs than the real one."""

from functools import partial

import pytest

from fastprompt.cli import main
from fastprompt.demo import experiment, page


@pytest.fixture
def small(monkeypatch):
    pictures = partial(experiment.write_dataset, train=2, test=2, domain_test=2, ood=16)
    monkeypatch.setattr(experiment, "write_dataset", pictures)
    monkeypatch.setattr(experiment, "EPOCHS", 2)
    monkeypatch.setattr(experiment, "SHOTS", 2)
    monkeypatch.setattr(experiment, "SEEDS", (1, 2))


@pytest.mark.slow
def test_demo_prints_tables_and_writes_a_page(small, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert [line.split("  ")[0] for line in out.splitlines() if line.startswith(("zero", "coop", "gallop"))] == [
        "zero-shot",
        "gallop, untrained",
        "coop",
        "gallop",
    ] * 2
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count("data:image") == page.PICTURES + 1
    assert not (tmp_path / "data.unfinished").exists()

    assert main(["demo", "--out", str(tmp_path)]) == 0
    again = capsys.readouterr()
    assert again.out.splitlines()[:-1] == out.splitlines()[:-1], "what was there was done again, or read differently"
    assert "rendering" not in again.err
    assert "training" not in again.err


@pytest.mark.slow
def test_untrained_gallop_adds_patches_to_zero_shot(small, tmp_path):
    result = experiment.run_experiment(tmp_path)
    zero_shot, untrained = (result.trials[name][0].measures for name in ("zero-shot", "gallop, untrained"))
    assert zero_shot.keys() == untrained.keys()
    assert "seconds" not in zero_shot
    assert untrained["auroc"] != zero_shot["auroc"]
    seeds = [trial.measures["accuracy"] for trial in result.trials["gallop"]]
    assert len(seeds) == 2

"""The table of all methods: which trials are done, what a page shows, and one trial on fewer pictures."""

import csv
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks import method_table, methods
from benchmarks.method_table import BEGIN, END, around_table, measure_all, table, trials
from benchmarks.methods import SETTINGS, make, run_trial, write_descriptions
from benchmarks.results import read_rows
from fastprompt.demo import experiment
from fastprompt.demo.captions import all_words
from fastprompt.errors import InputError
from fastprompt.learners import find_method


def row(label, seed="1", base=0.5, new=0.4):
    return {"label": label, "seed": seed, "base": str(base), "new": str(new), "fpr95": "0.6", "auroc": "0.7"}


@pytest.fixture
def page(tmp_path):
    file = tmp_path / "page.md"
    file.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe end.\n")
    return file


@pytest.fixture
def faked(monkeypatch, tmp_path):
    """Trials and steps that cost nothing; returns the trials that were run."""
    done = []

    def trial(setting, seed, *_):
        done.append((setting.method, seed))
        new = "" if setting.method == "sot-glp" else 0.5
        return {"base": 0.5 + seed / 100, "new": new, "fpr95": 0.75, "auroc": 0.8}

    materials = SimpleNamespace(dataset=SimpleNamespace(test=SimpleNamespace(class_names=("red star",))))
    monkeypatch.setattr(method_table, "prepare", lambda scenes: materials)
    monkeypatch.setattr(method_table, "run_trial", trial)
    monkeypatch.setattr(method_table, "measure_steps", lambda *_: {"coop": (12.34, None), "gallop": (56.0, 7.0)})
    return done


def test_what_is_done_is_not_done_again(faked, tmp_path, page, monkeypatch):
    measure_all(tmp_path, tmp_path, page)
    everything = len(trials())
    assert len(faked) == everything
    assert ("zero-shot", 2) not in faked and {("coop", 1), ("coop", 2), ("coop", 3)} <= set(faked)
    with (tmp_path / "methods.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == everything

    faked.clear()
    measure_all(tmp_path, tmp_path, page)
    assert faked == []
    monkeypatch.setitem(SETTINGS, "coop", replace(SETTINGS["coop"], epochs=99))
    measure_all(tmp_path, tmp_path, page)
    assert faked == [("coop", 1), ("coop", 2), ("coop", 3)]
    with (tmp_path / "methods.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == everything, "rows of the old setting are still there"


def test_no_row_is_lost_while_old_ones_are_dropped(faked, tmp_path, page, monkeypatch):
    """Stopped while the rows that stay are written."""
    measure_all(tmp_path, tmp_path, page)
    file = tmp_path / "methods.csv"
    before = read_rows(file)
    monkeypatch.setitem(SETTINGS, "coop", replace(SETTINGS["coop"], epochs=99))

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(csv.DictWriter, "writerows", stopped)
        with pytest.raises(KeyboardInterrupt):
            measure_all(tmp_path, tmp_path, page)
    assert read_rows(file) == before
    assert not list(tmp_path.glob("methods.n*"))
    faked.clear()
    measure_all(tmp_path, tmp_path, page)
    assert faked == [("coop", 1), ("coop", 2), ("coop", 3)]
    others = [row for row in before if row["label"] != "coop"]
    assert read_rows(file)[: len(others)] == others


def test_the_page_keeps_its_words(faked, tmp_path, page):
    for _ in range(2):
        measure_all(tmp_path, tmp_path, page)
    text = page.read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n\n**All methods") and text.endswith(f"{END}\n\nThe end.\n")
    assert "old" not in text
    (coop,) = [line for line in text.splitlines() if line.startswith("| coop")]
    shown = ["52.0 ± 1.0", "50.0 ± 0.0", "51.0", "75.0 ± 0.0", "80.0 ± 0.0", "12.3", "– |"]
    assert coop.replace("*", "").split(" | ")[1:] == shown
    assert [cell for cell in coop.split(" | ") if cell.startswith("**")][-1] == "**12.3**"


def test_a_method_that_knows_no_other_classes_has_a_gap():
    rows = [row(label, new="" if label == "sot-glp" else 0.4) for label in SETTINGS]
    cells = {one.label: one.cells for one in table([*rows, row("coop", "2", base=0.7, new=0.2)], {}).rows}
    base, new, harmonic, *_ = cells["sot-glp"]
    assert (base.mean, new, harmonic) == (0.5, None, None)
    base, new, harmonic, *_ = cells["coop"]
    assert (base.mean, new.mean) == pytest.approx((0.6, 0.3))
    assert harmonic == pytest.approx(0.4)  # of the means; the mean of 4/9 and 14/45 would be 0.378


@pytest.mark.parametrize("text", ["", BEGIN, f"{END} {BEGIN}", f"{BEGIN} {BEGIN} {END}"])
def test_a_page_without_markers_is_refused_before_any_work(text, faked, tmp_path):
    file = tmp_path / "page.md"
    file.write_text(text)
    with pytest.raises(InputError, match=r"page\.md must have the line"):
        measure_all(tmp_path, tmp_path, file)
    assert faked == []
    with pytest.raises(InputError, match=r"absent\.md must have"):
        around_table(tmp_path / "absent.md")


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_every_setting_makes_its_learner(scenes, setting):
    folder, materials = scenes
    learner = make(setting, materials, materials.dataset.test.class_names, folder)
    assert learner.method == setting.method
    assert setting.options.keys() <= learner.options.keys()


@pytest.mark.parametrize("label", ["coop", "dualpt", "sot-glp"])
def test_a_trial_trains_on_base_classes_with_ten_times_the_published_rate(scenes, label, monkeypatch):
    folder, materials = scenes
    seen = []
    real = methods.fit
    monkeypatch.setattr(methods, "fit", lambda *args: seen.append(args) or real(*args, progress=False))
    setting = replace(SETTINGS[label], epochs=2, batch_size=16)
    measures = run_trial(setting, 1, materials, folder)
    learner, source, settings = seen[0]
    published = find_method(setting.method).recipes["default"]
    assert (settings.lr, settings.weight_decay) == (10 * published.lr, published.weight_decay)
    assert (len(learner.class_names), len(source)) == (32, 64)
    torch.manual_seed(1)
    start = make(setting, materials, learner.class_names, folder)
    for trained, untrained in zip(learner.parameters(), start.parameters(), strict=True):
        assert not torch.equal(trained, untrained)
    assert 0 <= measures["auroc"] <= 1 and 0.05 < measures["base"] <= 1
    assert (measures["new"] == "") == learner.class_specific


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Two pictures a class."""
    folder = tmp_path_factory.mktemp("scenes")
    with pytest.MonkeyPatch.context() as patch:
        small = partial(experiment.write_dataset, train=2, test=2, domain_test=2, ood=8)
        patch.setattr(experiment, "write_dataset", small)
        materials = experiment.prepare(folder)
    write_descriptions(materials.dataset.test.class_names, folder / methods.DESCRIPTIONS)
    return folder, materials


def test_descriptions_name_every_class_in_words_that_the_model_knows(scenes):
    folder, materials = scenes
    entries = json.loads((folder / methods.DESCRIPTIONS).read_text())
    assert tuple(entries) == materials.dataset.test.class_names
    assert all(name in sentence for name, sentences in entries.items() for sentence in sentences)
    said = " ".join(sentence for sentences in entries.values() for sentence in sentences)
    assert set(said.replace(".", " .").split()) <= set(all_words())

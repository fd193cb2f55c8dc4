"""What works where only the packages that `pip install fastprompt` brings are installed, and what asks for an extra."""

import subprocess
import sys

import pytest

# Packages of the extra cannot be found, as where they are not installed.
WITHOUT_EXTRA = """
import sys
from importlib.machinery import PathFinder
EXTRA = {"matplotlib", "jinja2"}
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in EXTRA else PathFinder.find_spec(name, path, target)
    @classmethod
    def find_distributions(cls, context):  # torchmetrics looks there
        return [] if context.name in EXTRA else PathFinder.find_distributions(context)
sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
from fastprompt.cli import main
sys.exit(main(sys.argv[1:]))
"""
MISSING = "figures and pages: expected the package 'matplotlib': pip install 'fastprompt[report]'"


@pytest.fixture
def plain(photos, common):
    """Runs one command in a process that lacks the extra; returns its status, output and errors."""

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_EXTRA, *map(str, arguments)], capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.mark.slow
def test_training_and_testing_need_no_extra_and_say_that_the_page_is_missing(plain, photos, common, tmp_path):
    status, out, errors = plain("train", "coop", photos, *common, "--out", "run")
    assert status == 0, errors
    assert "coop" in out and "zero-shot" in out
    assert f"report.html is not written: {MISSING}" in errors
    assert (tmp_path / "run" / "model.safetensors").exists() and not (tmp_path / "run" / "report.html").exists()
    assert plain("evaluate", "run")[0] == 0
    picture = next(photos.rglob("*.png"))
    assert plain("explain", "run", picture) == (2, "", f"fastprompt: error: {MISSING}\n")
    assert not (tmp_path / "run" / "explained").exists()


@pytest.mark.slow
def test_the_demo_asks_for_the_extra_before_its_work(plain, tmp_path):
    assert plain("demo", "--out", "demo") == (2, "", f"fastprompt: error: {MISSING}\n")
    assert not (tmp_path / "demo").exists()

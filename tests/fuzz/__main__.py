"""Run a part of the hunt by hand: python -m tests.fuzz [--seed 1] [--first 0] [--cases 25] [--step 1]."""

import argparse
import shutil
import tempfile
from pathlib import Path

from tests.fuzz.hunt import hunt
from tests.fuzz.world import build

parser = argparse.ArgumentParser(description=__doc__)
for name, default in (("seed", 1), ("first", 0), ("cases", 25), ("step", 1)):
    parser.add_argument(f"--{name}", type=int, default=default)
asked = parser.parse_args()
with tempfile.TemporaryDirectory() as folder:
    template, home = Path(folder, "template"), Path(folder, "world")
    home.mkdir()
    build(home)
    shutil.copytree(home, template)
    stop = asked.first + asked.cases * asked.step
    print(hunt(template, home, asked.seed, range(asked.first, stop, asked.step)))

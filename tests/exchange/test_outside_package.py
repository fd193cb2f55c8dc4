"""A method of another package: installed with one file, it does what every method does, and no other code knows it."""

import os
import subprocess
import sys

import torch

from tests.experiment.conftest import COLOURS

MODULE = '''
"""Patient: a learned context whose logits are scaled by a learned number."""

from collections.abc import Sequence

import torch
from torch import nn

from fastprompt.learners.base import Scores
from fastprompt.learners.recipe import Recipe
from fastprompt.learners.text import TextLearner, initial_context
from fastprompt.sources import POOLED


class Patient(TextLearner):
    """Patient: a learned context whose logits are scaled by a learned number (an example).

    Args:
        backbone: the frozen model.
        class_names: C names.
        context: words to start from, or a number of tokens.
        patience: share of the logits that is not learned.
    """

    method = "patient"
    recipes = {"default": Recipe(source="ours", epochs=2)}
    reads = POOLED
    contexts_named = ("context",)
    foreign_names = {"ctx": "context", "temper": "temper"}

    def __init__(self, backbone, class_names: Sequence[str], *, context: int | str = 2, patience: float = 0.5):
        start = initial_context(backbone, context)
        super().__init__(backbone, class_names, context_tokens=len(start), suffix="")
        self.context, self.temper, self.patience = nn.Parameter(start), nn.Parameter(torch.zeros(1)), patience

    @classmethod
    def read_foreign(cls, state, arguments):
        return {**super().read_foreign(state, arguments), "patience": arguments["patience"]}

    def encode_text(self):
        return self.backbone.encode_prompts(self.context[None], self.class_tokens)

    def forward(self, features):
        cosines = self.backbone.accept(features).pooled @ self.text_features()[0].T
        return Scores(self.backbone.logit_scale * (self.patience + self.temper.exp()) * cosines)
'''
# Relative to a folder with photos, a checkpoint and a list of class names.
PROGRAM = """
import sys, torch
import fastprompt
from fastprompt.cli import main
from safetensors import safe_open

folder = "local-dir:" + sys.argv[1]
common = ["--backbone", folder, "--shots", "2", "--epochs", "1", "--batch-size", "4"]
commands = [
    ["train", "patient", "photos", *common, "--patience", "0.25", "--context", "2", "--out", "run"],
    ["evaluate", "run", "--no-cache"],
    ["predict", "run", "photos/test/red/0.png"],
    ["explain", "run", "photos/test/red/0.png"],
    ["export", "run"],
    ["words", "run"],
    ["import", "theirs.pth", "--backbone", folder, "--class-names", "names.txt", "--out", "imported"],
]
for command in commands:
    assert main(command) == 0, command
trained, imported = (fastprompt.load_run(run, device="cpu") for run in ("run", "imported"))
assert type(trained).__module__ == "patient_prompts"
assert trained.options == {"context": 2, "patience": 0.25}
assert imported.options == {"context": 3, "patience": 0.75}
assert torch.equal(imported.context, torch.load("theirs.pth", weights_only=True)["state_dict"]["ctx"])
imported.save_pretrained("saved")
again = fastprompt.Learner.from_pretrained("saved", backbone=imported.backbone)
features = again.backbone.encode_images(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
assert again.patience == 0.75
assert torch.equal(again.predict(features), imported.predict(features))
with safe_open("run/head.safetensors", "pt") as file:
    assert file.metadata()["method"] == '"patient"'
"""


def installed(site, name, module):
    """A distribution as pip leaves it: one module, and a dist-info folder with its entry point."""
    site.mkdir()
    (site / f"{name}.py").write_text(module)
    (info := site / f"{name}-1.0.dist-info").mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[fastprompt.methods]\nanything = {name}\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *filter(None, sys.path)])}


def test_it_trains_predicts_exports_explains_is_imported_and_comes_back(model_folder, photos, common, tmp_path):
    context, names = torch.randn(3, 48, generator=torch.Generator().manual_seed(1)), sorted(COLOURS)
    theirs = {"state_dict": {"ctx": context, "temper": torch.ones(1)}, "args": {"patience": 0.75}}
    torch.save(theirs, tmp_path / "theirs.pth")
    (tmp_path / "names.txt").write_text("\n".join(names))
    environment = installed(tmp_path / "site", "patient_prompts", MODULE)
    subprocess.run([sys.executable, "-c", PROGRAM, str(model_folder)], env=environment, cwd=tmp_path, check=True)


def test_a_broken_package_takes_no_other_method_along(tmp_path):
    environment = installed(tmp_path / "site", "broken_prompts", "import a_module_that_nobody_has\n")
    program = "from fastprompt import find_method; print(find_method('coop').method)"
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "coop"
    assert "methods of broken_prompts cannot be used: broken_prompts" in ended.stderr
    assert "a_module_that_nobody_has" in ended.stderr

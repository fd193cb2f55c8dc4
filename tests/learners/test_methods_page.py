"""docs/methods.md says what is learned: its numbers are those of the learners on the shapes of ViT-B/16."""

import re
from pathlib import Path

from fastprompt.learners import make_learner
from tests.models import make_backbone, make_clip

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def test_parameter_counts_are_those_of_the_learners():
    vision = {"image_size": 224, "patch_size": 16, "width": 768, "layers": 1}
    text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 1}
    backbone = make_backbone(make_clip(vision, text, embed_dim=512))
    said = {}
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"\| `([\w-]+)` \|.*\| ([\d,]+) \|[^|]*\|$", line):
            said[found[1]] = int(found[2].replace(",", ""))
    assert len(said) == 12
    names = [f"class {index}" for index in range(100)]
    for method, count in said.items():
        learner = make_learner(method, backbone, names)
        assert sum(parameter.numel() for parameter in learner.parameters()) == count, method

"""Training on bfloat16 weights agrees with training on float32 weights: 200 steps of GalLoP on the demo's scenes."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastprompt.backbone import load_backbone
from fastprompt.demo.scenes import DEMO_CLASSES, demo_scene, render
from fastprompt.learners import GalLoP
from fastprompt.training import fit, published_settings

CLASSES = DEMO_CLASSES[::4]  # 16 of them
SHOTS, TESTED = 4, 8
EPOCHS, BATCH = 50, 16  # 4 steps an epoch


class Rendered:
    """Features of scenes in one precision; a source of batches, too."""

    def __init__(self, backbone, count, seed):
        self.labels = torch.arange(len(CLASSES)).repeat_interleave(count)
        pixels = []
        for label, spec in enumerate(CLASSES):
            for index in range(count):
                rng = np.random.default_rng((seed, label, index))
                pixels.append(np.asarray(render(demo_scene(spec, "photo", rng), rng)[0]))
        mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.mean, backbone.std))
        images = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - mean) / std
        with torch.no_grad():
            self.features = backbone.encode_images(images)

    def __len__(self):
        return len(self.labels)

    class_names = None

    def batch(self, indices, generator, reads):
        return self.features.keep(reads)[indices]


@pytest.fixture(scope="module")
def outcome():
    """By precision the mean loss of every epoch, and the test probabilities after the last."""
    found = {}
    settings = replace(published_settings(GalLoP.recipes["default"], SHOTS), epochs=EPOCHS, batch_size=BATCH, lr=0.02)
    for precision in ("fp32", "bf16"):
        backbone = load_backbone("demo", device="cpu", precision=precision)
        torch.manual_seed(0)
        learner = GalLoP(backbone, [spec.name for spec in CLASSES])
        history = fit(learner, Rendered(backbone, SHOTS, seed=1), settings, progress=False)
        assert all(parameter.dtype == torch.float32 for parameter in learner.parameters())
        tested = Rendered(backbone, TESTED, seed=2)
        losses = np.array([epoch.loss for epoch in history.epochs])
        found[precision] = losses, learner.predict(tested.features).float(), tested.labels
    return found


@pytest.mark.slow
def test_both_learn_the_same(outcome):
    (exact, *_), (rounded, *_) = outcome["fp32"], outcome["bf16"]
    learned = exact[0] - exact[-1]
    assert learned > 0.2 * exact[0]  # there is something to agree on
    assert np.abs(rounded - exact).max() < 0.05 * learned


@pytest.mark.slow
def test_both_predict_the_same(outcome):
    (_, exact, labels), (_, rounded, _) = outcome["fp32"], outcome["bf16"]
    accuracies = [(probabilities.argmax(1) == labels).float().mean().item() for probabilities in (exact, rounded)]
    same = (exact.argmax(1) == rounded.argmax(1)).float().mean()
    assert same > 0.95
    assert abs(accuracies[0] - accuracies[1]) < 0.02

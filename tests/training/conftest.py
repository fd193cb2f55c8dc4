"""A small learner and a source in memory, after the contract of the rooms, and nothing else of the package."""

import signal
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastprompt.sources import CachedSource, ImageFeatures
from fastprompt.training import RunFolder, TrainingSettings, fit


class ToyLearner(nn.Module):
    """A linear classifier whose loss drops random inputs, as prompt dropout does."""

    method = "toy"
    reads = frozenset({"pooled"})

    def __init__(self, classes=4, width=8):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, width))
        self.bias = nn.Parameter(torch.zeros(classes))
        self.class_names = tuple(f"class {i}" for i in range(classes))
        self.backbone = SimpleNamespace(name="toy-tower", pretrained=None, patches="value", fingerprint="f00d")
        self.options = {"k": [5, 10]}

    def forward(self, features):
        logits = features.pooled @ self.weight.T + self.bias
        return SimpleNamespace(logits=logits, parts={"pooled": features.pooled})

    def loss(self, scores, labels, generator=None):
        keep = torch.rand(scores.parts["pooled"].shape, generator=generator) < 0.5
        dropped = (scores.parts["pooled"] * keep) @ self.weight.T + self.bias
        return F.cross_entropy(dropped, labels)

    def prepare(self, source):
        self.prepared_on = len(source)

    def backward(self, scores, labels, *, generator=None):
        loss = self.loss(scores, labels, generator)
        loss.backward()
        return loss.detach()


@dataclass
class Rows:
    """Cached features in memory; remembers which rows were asked for, and may do something at a certain call."""

    pooled: torch.Tensor
    patches: torch.Tensor
    at_call: dict = field(default_factory=dict)
    asked: list = field(default_factory=list)
    named: list = field(default_factory=list)

    def __len__(self):
        return len(self.pooled)

    def rows(self, indices, names):
        self.asked.append(indices.tolist())
        self.named.append(set(names))
        self.at_call.get(len(self.asked), lambda: None)()
        return ImageFeatures(self.pooled, self.patches).keep(names)[indices].tensors


@pytest.fixture
def toy():
    """Makers of learners, sources and settings."""
    torch.set_num_threads(1)

    def source(n=44, classes=4, width=8, at_call=None):
        generator = torch.Generator().manual_seed(0)
        labels = torch.arange(n) % classes
        centres = torch.randn(classes, width, generator=generator)
        pooled = centres[labels] + 0.3 * torch.randn(n, width, generator=generator)
        return CachedSource(Rows(F.normalize(pooled, dim=1), torch.zeros(n, 2, 3), at_call or {}), labels)

    def settings(**changes):
        return TrainingSettings(**{"epochs": 4, "batch_size": 8, "lr": 0.5, "warmup_lr": 0.1} | changes)

    return SimpleNamespace(
        learner=ToyLearner,
        source=source,
        settings=settings,
        features=ImageFeatures,
        run=lambda path, **config: RunFolder.create_or_resume(path, config),
        fit=lambda *args, **options: fit(*args, progress=False, **options),
    )


@pytest.fixture(autouse=True)
def python_sigint():
    """Python's own SIGINT handler: a process that was started in the background ignores the signal otherwise."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)

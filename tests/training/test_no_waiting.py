"""A training step never waits for its device.

The meta device stands for the GPU: what it holds cannot be read, so item(), a copy to the host, or a shape that depends
on values is an error there. A copy from the host is none, but one that is not queued makes a GPU's host wait.
"""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastprompt.learners import CoOp, GalLoP
from fastprompt.sources import CachedSource
from fastprompt.training.loop import _Training
from tests.models import make_backbone, make_clip


class Copies(TorchDispatchMode):
    """Notes copies from the host to the device, and whether they were queued."""

    def __init__(self):
        super().__init__()
        self.queued = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        source = args[-1] if func is torch.ops.aten.copy_.default else args[0] if args else None
        if copies and source.device.type == "cpu" and result.device.type == "meta":
            self.queued.append(bool((kwargs or {}).get("non_blocking")))
        return result


def on_meta():
    """The small backbone on the meta device; its temperature is read where there are numbers."""
    model = make_clip().float().to("meta")
    model.logit_scale = nn.Parameter(torch.tensor(4.6))
    backbone = make_backbone(model)
    model.logit_scale = nn.Parameter(torch.tensor(4.6, device="meta"))
    return backbone


@pytest.fixture
def training(toy, monkeypatch):
    backbone = on_meta()
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # knows no meta device, nor does torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())

    # It has no generators either.
    monkeypatch.setattr(_Training, "_generator", lambda *_: torch.Generator().manual_seed(0))

    def make(learner, **options):
        rows = toy.source(n=8).features
        rows.pooled = torch.randn(8, backbone.embed_dim)
        rows.patches = torch.randn(8, 16, backbone.patch_width)
        source = CachedSource(rows, torch.arange(8) % 2)
        learner = learner(backbone, ["cat", "hot dog"], **options)
        return _Training(learner, source, toy.settings(), None, torch.device("meta"))

    return make


@pytest.mark.parametrize(("learner", "options"), [(CoOp, {}), (GalLoP, {"k": (2, 5)})])
def test_a_step_does_not_wait(training, learner, options):
    steps = training(learner, **options)
    steps._train_step(torch.arange(4))  # what is made once for all steps
    with Copies() as copies:
        steps._train_step(torch.arange(4))
    assert copies.queued and all(copies.queued)


def test_a_step_that_reads_a_number_is_noticed(training, monkeypatch):
    steps = training(CoOp)
    loss = CoOp.loss
    monkeypatch.setattr(CoOp, "loss", lambda self, *args, **_: loss(self, *args) * (loss(self, *args).item() > 0))
    with pytest.raises((RuntimeError, NotImplementedError)):
        steps._train_step(torch.arange(4))

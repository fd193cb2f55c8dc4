"""Checkpoints as other code writes them, and a folder that the small model is loaded from."""

import argparse
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from tests.experiment.conftest import common, model_folder, photos  # noqa: F401

SGD = partial(torch.optim.SGD, lr=0.002, momentum=0.9, weight_decay=5e-4)
COSINE = partial(CosineAnnealingLR, T_max=10.0)


class ConstantWarmup(LRScheduler):
    """As Dassl's: holds the scheduler that follows it, which its state_dict therefore holds as an object."""

    def __init__(self, optimizer, successor):
        self.successor = successor
        super().__init__(optimizer)

    def get_lr(self):
        return [1e-5 for _ in self.base_lrs]


class Prompts(nn.Module):
    """A CoOp-like PromptLearner: parameters and buffers by name."""

    def __init__(self, parameters, buffers):
        super().__init__()
        for name, value in parameters.items():
            module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(value))
        for name, value in buffers.items():
            self.register_buffer(name, value)


def save_dassl(file, parameters, buffers, optimizer=SGD, following=COSINE):
    """A model.pth.tar-N of Dassl after one step with its warm-up scheduler, in half precision as CoOp's."""
    model = Prompts({name: value.half() for name, value in parameters.items()}, buffers)
    optimizer = optimizer(model.parameters())
    scheduler = ConstantWarmup(optimizer, following(optimizer))
    model.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "val_result": None}
    torch.save({"state_dict": model.state_dict(), "epoch": 10, **state}, file)


def save_gallop(file, parameters, kind=argparse.Namespace, **arguments):
    """A .ckpt of GalLoP: its three tensors, and the arguments of its script as a namespace, or as another ``kind``."""
    given = {"clip_name": "clip_vit_b16", "topk": [1, 3], "global_dropout_p": 0.5, **arguments}
    state = {"epoch": 49, "train_meter": {"top1": torch.tensor(0.5)}, "scaler": None, "optimizer": {}, "scheduler": {}}
    torch.save({"state_dict": dict(parameters), **state, "args": kind(**given)}, file)


@pytest.fixture
def random():
    return torch.Generator().manual_seed(7)

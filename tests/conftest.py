"""Fixtures that several rooms use."""

import pytest
import torch

from tests.models import make_backbone, make_clip


@pytest.fixture(scope="session")
def vit_backbone():
    return make_backbone(make_clip())


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(3, 3, 32, 32, dtype=torch.float64)

"""Fixtures that several rooms use."""

import logging
import os

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton is first imported:
# open_clip does that.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    """Tests of modules that have a DEVICE run there; where that is no GPU, Triton's kernels run in its interpreter."""
    for item in items:
        if hasattr(item.module, "DEVICE"):
            item.add_marker(pytest.mark.gpu)
            parameters = getattr(item, "callspec", None)
            if parameters is not None and "triton" in parameters.params.values() and not torch.cuda.is_available():
                item.add_marker(pytest.mark.interpreter)


@pytest.fixture(autouse=True)
def messages_as_before():
    """A benchmark silences open_clip, which logs to the root, for the process that it runs in."""
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture(scope="session")
def vit_backbone():
    from tests.models import make_backbone, make_clip  # brings open_clip, which the kernels' tests do without

    return make_backbone(make_clip())


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(3, 3, 32, 32, dtype=torch.float64)

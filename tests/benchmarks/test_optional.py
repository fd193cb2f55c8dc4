"""Peers that cannot run everywhere say why, in one line."""

import pytest
import torch

from benchmarks.measure import UnavailableError
from benchmarks.optional import compiled


def test_without_a_compiler_the_compiled_peer_is_left_out_with_a_hint():
    from torch._inductor import config

    torch.compiler.reset()
    with (
        config.patch({"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}),
        pytest.raises(UnavailableError, match=r"no-such-compiler.*CXX") as raised,
    ):
        compiled(lambda x: (3 * x + 7).relu().sum())(torch.ones(5))
    assert len(str(raised.value).splitlines()) == 1

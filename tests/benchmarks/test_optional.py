"""Peers that cannot run everywhere say why, in one line."""

import pytest
import torch
from fastprompt_kernels import prefix_attention
from fastprompt_kernels.prefix_attention import xformers

from benchmarks.measure import UnavailableError
from benchmarks.optional import by_xformers, compiled
from fastprompt.backbone import shared_prefix


def test_without_a_compiler_the_compiled_peer_is_left_out_with_a_hint():
    from torch._inductor import config

    torch.compiler.reset()
    with (
        config.patch({"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True}),
        pytest.raises(UnavailableError, match=r"no-such-compiler.*CXX") as raised,
    ):
        compiled(lambda x: (3 * x + 7).relu().sum())(torch.ones(5))
    assert len(str(raised.value).splitlines()) == 1


def test_xformers_attends_while_the_function_runs_and_is_left_out_where_it_cannot(monkeypatch):
    tokens, sequence, attend = torch.ones(1, 3, 3, 1, 8), torch.zeros(1, 2, dtype=torch.long), prefix_attention
    run = by_xformers(lambda tokens: shared_prefix.prefix_attention(tokens, sequence))
    with pytest.raises(UnavailableError, match="impl='xformers' cannot run here: it needs tensors on a CUDA"):
        run(tokens)
    monkeypatch.setattr(xformers, "why_not", lambda device: None)
    monkeypatch.setattr(xformers, "attend", lambda q, k, v, blocks: 7 * q)
    assert run(tokens).unique().tolist() == [7]
    assert shared_prefix.prefix_attention is attend

"""Peers that may be missing: compiled code needs a C++ compiler, KeOps and xformers must be installed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from unittest import mock

import torch
import torch.nn.functional as F
from fastprompt_kernels import prefix_attention
from torch import Tensor

from benchmarks.measure import UnavailableError


def compiled(function: Callable[..., object]) -> Callable[..., object]:
    """``torch.compile`` of a function for one shape, without graph breaks. It compiles at the first call.

    Callers reset the compiler between shapes, or it would in time refuse another one. The function returned raises
    UnavailableError where compilation fails, for example without a C++ compiler.
    """
    prepare = cache(partial(torch.compile, function, fullgraph=True, dynamic=False))  # the compiler is slow to import

    def run(*args: object) -> object:
        try:
            return prepare()(*args)
        except torch._dynamo.exc.BackendCompilerFailed as error:  # no public name
            reason = str(error).strip().splitlines()[0]
            hint = "on a CPU it needs g++, or the C++ compiler that the environment variable CXX names"
            raise UnavailableError(f"torch.compile failed: {reason}; {hint}") from error

    return run


def by_xformers(function: Callable[..., object]) -> Callable[..., object]:
    """A function, forward and backward, whose text tower attends by xformers.

    The function returned raises UnavailableError where xformers cannot run.
    """
    from fastprompt.backbone import shared_prefix  # brings open_clip, which the similarity does not need

    def attention(*args: object, **options: object) -> Tensor:
        try:
            return prefix_attention(*args, **options, impl="xformers")
        except ValueError as error:
            raise UnavailableError(str(error)) from error

    def run(*args: object) -> object:
        with mock.patch.object(shared_prefix, "prefix_attention", attention):
            return function(*args)

    return run


def topk_mean_keops(patches: Tensor, prompts: Tensor, k: Sequence[int]) -> Tensor:
    """Values (B, N, C) with KeOps, which finds the k patches without the dense similarity.

    Its reductions to k have no gradient: the patches found are averaged in plain torch, and so gradients flow.

    Raises:
        UnavailableError: pykeops is not installed.
    """
    if find_spec("pykeops") is None:
        raise UnavailableError("pykeops is not installed: pip install pykeops (it needs a C++ compiler)")
    from pykeops.torch import LazyTensor

    B, P, D = patches.shape
    keys, first = LazyTensor(patches.detach()[:, None].contiguous()), P * torch.arange(B, device=patches.device)
    values = []
    for prompt, count in zip(prompts, k, strict=True):
        queries = LazyTensor(prompt.detach()[None, :, None].contiguous())
        chosen = (-(queries | keys)).argKmin(count, dim=2) + first[:, None, None]  # (B, C, count)
        means = F.embedding_bag(chosen.flatten(0, 1), patches.flatten(0, 1), mode="mean").view(B, -1, D)
        values.append((means * prompt).sum(-1))
    return torch.stack(values, dim=1)

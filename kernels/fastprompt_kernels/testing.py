"""Tools to test an operation as this package tests its own: inputs, the error rule, poisoned memory.

The error rule: against a float64 oracle, an implementation may err as much as plain PyTorch does on the same inputs in
the same precision, plus a band for the roundings that a different order of summation makes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.utils.deterministic
from torch import Tensor

# A term is rounded some four times (the weight of each scale, their sum, the product), and so are the partial sums, by
# half a unit each at the most: together four units.
BAND = 4


@dataclass(frozen=True)
class Inputs:
    """Arguments of topk_similarity and the gradient of its result.

    Attributes:
        patches: (B, P, D).
        prompts: (N, C, D).
        k: the scales of every prompt.
        grad: (B, N, C), zero wherever float32 rounding alone could decide which patches are selected.
    """

    patches: Tensor
    prompts: Tensor
    k: tuple[tuple[int, ...], ...]
    grad: Tensor


def draw_inputs(
    shape: tuple[int, int, int, int, int],
    k: Sequence[Sequence[int]],
    dtype: torch.dtype,
    *,
    seed: int = 0,
    ties: bool = False,
    contiguous: bool = True,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Random inputs, drawn in the precision of the test.

    Args:
        shape: (B, P, N, C, D).
        k: the scales of every prompt.
        dtype: of patches and prompts.
        seed: of the random generator.
        ties: draw halves between -1 and 1, so that many similarities are equal and every precision holds them exactly.
        contiguous: False gives strides that are not those of a contiguous tensor.
        device: of the tensors; the numbers are the same on every device.
    """
    B, P, N, C, D = shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        halves = torch.randint(-2, 3, size, generator=generator) / 2
        tensor = (halves if ties else torch.randn(size, generator=generator)).to(device, dtype)
        return tensor if contiguous else tensor.transpose(0, 2).contiguous().transpose(0, 2)

    patches, prompts = draw(B, P, D), draw(N, C, D)
    grad = torch.randn(B, N, C, generator=generator, dtype=torch.promote_types(dtype, torch.float32)).to(device)
    scales = tuple(tuple(row) for row in k)
    if not ties:
        grad[_hangs_on_rounding(patches, prompts, scales)] = 0
    return Inputs(patches, prompts, scales, grad)


def _hangs_on_rounding(patches: Tensor, prompts: Tensor, k: Sequence[Sequence[int]]) -> Tensor:
    """(B, N, C): whether the last similarity selected and the first left out are closer than float32 can tell."""
    left, right = patches.double(), prompts.double()
    ranked = torch.einsum("bpd,ncd->bncp", left, right).sort(descending=True).values
    band = torch.finfo(torch.float32).eps * torch.einsum("bpd,ncd->bncp", left.abs(), right.abs()).amax(-1)
    unsure = torch.zeros_like(band, dtype=torch.bool)
    for n, scales in enumerate(k):
        for scale in scales:
            if scale < ranked.shape[-1]:
                unsure[:, n] |= ranked[:, n, :, scale - 1] - ranked[:, n, :, scale] <= band[:, n]
    return unsure


@dataclass(frozen=True)
class StatisticsInputs:
    """Arguments of patch_statistics and the gradients of its results.

    Attributes:
        patches: (B, P, D).
        prompts: (C, D).
        scale: of the logits.
        labels: (B,) int64.
        grads: of maximum, logsumexp and entropy, (B, P) each; that of the maximum is zero wherever float32 rounding
            alone could decide which class it is.
    """

    patches: Tensor
    prompts: Tensor
    scale: float
    labels: Tensor
    grads: tuple[Tensor, Tensor, Tensor]


def draw_statistics_inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    scale: float = 1.0,
    seed: int = 0,
    ties: bool = False,
    contiguous: bool = True,
    device: torch.device | str = "cpu",
) -> StatisticsInputs:
    """Random inputs of patch_statistics, drawn in the precision of the test.

    Args:
        shape: (B, P, C, D).
        dtype: of patches and prompts.
        scale: of the logits.
        seed: as in draw_inputs, like ties, contiguous and device.
        ties: whether many logits are equal.
        contiguous: whether the tensors are.
        device: of the tensors.
    """
    B, P, C, D = shape
    drawn = draw_inputs((B, P, 1, C, D), [[1]], dtype, seed=seed, ties=ties, contiguous=contiguous, device=device)
    generator = torch.Generator().manual_seed(seed)
    accumulator = torch.promote_types(dtype, torch.float32)
    grads = torch.randn(3, B, P, generator=generator, dtype=accumulator).to(device)
    labels = torch.randint(C, (B,), generator=generator).to(device)
    if not ties and C > 1:
        left, right = drawn.patches.double(), drawn.prompts[0].double()
        first, second = (left @ right.T).topk(2).values.unbind(-1)
        band = torch.finfo(torch.float32).eps * (left.abs() @ right.abs().T).amax(-1)
        grads[0][first - second <= band] = 0
    return StatisticsInputs(drawn.patches, drawn.prompts[0], scale, labels, tuple(grads))


def assert_as_accurate(actual: Tensor, plain: Tensor, oracle: Tensor, terms: Tensor, what: str = "result") -> None:
    """Apply the error rule to every element.

    Args:
        actual: what is tested.
        plain: what plain PyTorch gives on the same inputs, in the dtype of `actual`.
        oracle: the truth, in float64.
        terms: the sum of the absolute values of the terms that make up each element, in float64; BAND rounding units
            of it are the band.
        what: the name of the tensor, for the message.

    Raises:
        AssertionError: names the worst element, the three values and the error allowed.
    """
    assert actual.dtype == plain.dtype, f"{what}: dtype {actual.dtype}, expected {plain.dtype}"
    assert actual.shape == oracle.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    if oracle.numel() == 0:
        return
    allowed = (plain.double() - oracle).abs().max() + BAND * torch.finfo(actual.dtype).eps * terms
    # Not a number is the worst of all errors.
    excess = ((actual.double() - oracle).abs() - allowed).nan_to_num(nan=torch.inf)
    worst = tuple(int(i) for i in torch.unravel_index(excess.argmax(), excess.shape))
    assert excess[worst] <= 0, (
        f"{what}{list(worst)} is {actual[worst].item()!r}, plain PyTorch gives {plain[worst].item()!r}, the truth is "
        f"{oracle[worst].item()!r}: an error of {(actual[worst].double() - oracle[worst]).abs().item():.3g}, "
        f"allowed are {allowed[worst].item():.3g}"
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialised memory with NaN (integers: their largest value), so that reading it shows in the result."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill

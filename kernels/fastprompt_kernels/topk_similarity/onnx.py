"""topk_similarity in operations that ONNX has."""

from collections.abc import Callable

import torch
from torch import Tensor

from . import op, reference


def onnx_decompositions() -> dict[torch._ops.OpOverload, Callable]:
    """Make the table by which torch expresses topk_similarity and selected_patches in operations that ONNX has.

        program = torch.export.export(module, inputs).run_decompositions(onnx_decompositions())
        torch.onnx.export(program, dynamo=True)

    All implementations become the same operations. The table is for ONNX alone: a stable sort becomes a topk, which
    by ONNX's definition, and not by torch's, puts the first of equal values first.
    """
    return {
        torch.ops.fastprompt.topk_similarity.default: _topk_similarity,
        torch.ops.aten.sort.stable: _stable_sort,
    }


def _topk_similarity(patches: Tensor, prompts: Tensor, k: list[int], keep: bool, impl: str) -> tuple[Tensor, Tensor]:
    ranked = reference.scores(patches, prompts).topk(max(k)).values
    return reference.means_of_largest(ranked, op.nested(k, len(prompts))), patches.new_empty(0)


def _stable_sort(
    values: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    return torch.topk(values, values.shape[dim], dim, descending)

"""What the buffers of CoOp's family tell of a checkpoint's classes: how many there are, and their names in order."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastprompt.backbone import Backbone
from fastprompt.errors import InputError
from fastprompt.exchange.checkpoint import Checkpoint
from fastprompt.exchange.words import token_embeddings

# CoOp's family stores half precision. Embeddings of different tokens, or of different CLIPs, differ in the first digit.
SAME_EMBEDDING = 1e-2


def read_class_rows(checkpoint: Checkpoint, backbone: Backbone, class_names: tuple[str, ...]) -> Checkpoint:
    """Compare the embedded names in ``token_suffix`` with those given, and read what the rows tell of the method.

    Several contexts are those of the classes, one each, or PLOT's, with a row for every context and class. The same
    token in front of every name is the last word of ProGrad's sentences with a comma, which that code does not train:
    it becomes the last token of the context.

    Args:
        checkpoint: one without such buffers, such as GalLoP's, is returned as it is.
        backbone: whose token embeddings the rows are.
        class_names: as given, in order.

    Raises:
        InputError: other classes, another number of them, or another order.
    """
    rows = checkpoint.rows
    if rows is None:
        return checkpoint
    context = checkpoint.state["ctx"]
    several = context.dim() == 3 and len(context) != len(rows)
    if several and len(rows) % max(len(context), 1):
        raise InputError(
            f"{checkpoint.file} has {len(context)} contexts, which do not fit its {len(rows)} embedded names"
        )
    classes = len(rows) // len(context) if several else len(rows)
    if classes != len(class_names):
        raise InputError(f"{checkpoint.file} knows {classes} classes, but {len(class_names)} are named")
    table = token_embeddings(backbone).cpu()
    tokens = backbone.tokenize(class_names, ".")
    names = [table[ids] for ids in tokens.ids.cpu().split(tokens.lengths)]
    wrong = _first_difference(rows, names)
    if wrong is not None and (rows[:, 0] == rows[:1, 0]).all() and _first_difference(rows[:, 1:], names) is None:
        last = rows[0, 0].expand(*context.shape[:-2], 1, -1)
        return replace(checkpoint, state={**checkpoint.state, "ctx": torch.cat([context, last], dim=-2)})
    if wrong is not None:
        found = _read(rows[wrong], table, backbone)
        number = wrong % classes
        raise InputError(
            f"{checkpoint.file} has {found!r} as class {number}, but {class_names[number]!r} is named: "
            "expected its own classes in its own order"
        )
    return checkpoint


def _first_difference(rows: Tensor, names: list[Tensor]) -> int | None:
    """The first of the rows (R, L, W) that does not begin with its name; names repeat from row to row."""
    for number, row in enumerate(rows):
        name = names[number % len(names)]
        if len(name) > len(row) or (row[: len(name)] - name).abs().max() > SAME_EMBEDDING * name.abs().max():
            return number
    return None


def _read(row: Tensor, table: Tensor, backbone: Backbone) -> str:
    """The words of embedded tokens (L, W) in front of the end of text, without the full stop."""
    ids = torch.cdist(row, table).argmin(dim=-1).tolist()
    end = backbone.tokenizer.end_of_text
    return backbone.tokenizer.decode(ids[: ids.index(end)] if end in ids else ids).strip().removesuffix(".").strip()

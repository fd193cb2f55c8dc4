"""What a language model says about each class: a JSON file, and its text features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastprompt.backbone import Backbone
from fastprompt.documents import check_object, home_path, read_json, short
from fastprompt.errors import InputError


def load_descriptions(file: str | Path, class_names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The sentences of each class, from a JSON file {class name: [sentences]}.

    That is the format in which Menon & Vondrick (arXiv 2210.07183) and CuPL (arXiv 2209.03320) released theirs. Names
    must be those of the data set, letter by letter. Classes that are not asked for may be in the file.

    Args:
        file: the JSON file.
        class_names: C names.

    Raises:
        InputError: no such file, another content, or a class without an entry.
    """
    entries = read_json(home_path(file), "descriptions")
    check_object(entries, f"descriptions {file}")
    absent = [name for name in dict.fromkeys(class_names) if name not in entries]
    if absent:
        others = f" (nor for {len(absent) - 1} others)" if absent[1:] else ""
        raise InputError(f"descriptions {file}: has no entry for class {absent[0]!r}{others}")
    for name in class_names:
        sentences = entries[name]
        if (
            not isinstance(sentences, list)
            or not sentences
            or not all(isinstance(s, str) and s.strip() for s in sentences)
        ):
            raise InputError(
                f"descriptions {file}: expected at least one sentence for class {name!r}, got {short(sentences)}"
            )
    return tuple(tuple(entries[name]) for name in class_names)


@torch.no_grad()
def encode_descriptions(backbone: Backbone, descriptions: Sequence[Sequence[str]]) -> Tensor:
    """Frozen text features (C, D) of each class: the mean of those of its sentences, L2-normalised.

    Args:
        backbone: the frozen model.
        descriptions: the sentences of C classes.

    Raises:
        InputError: a sentence is longer than the text tower reads.
    """
    no_context = backbone.embed_words("")[None]  # (1, 0, W)
    means = [
        backbone.encode_prompts(no_context, backbone.tokenize(sentences))[0].mean(dim=0) for sentences in descriptions
    ]
    return F.normalize(torch.stack(means), dim=-1)

"""Class names as tokens, and their packing into rows for the text tower."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastprompt.errors import InputError

# Attention runs inside rows of packed names, so its cost grows with the row; short rows leave more slots empty.
# 128 tokens keep attention near 4 % of the arithmetic of a CLIP block and fill the tiles of a GPU.
ROW_TOKENS = 128


@dataclass(frozen=True)
class ClassTokens:
    """C class names as the real tokens that follow the context: name, suffix and end of text, without padding.

    Attributes:
        class_names: the C names as given.
        ids: (T,) token ids of all classes, one after the other; each class ends with its end-of-text token.
        lengths: tokens of each class; they sum to T.
        name_lengths: how many of these are the name alone, for prompts with a context behind the name.
    """

    class_names: tuple[str, ...]
    ids: Tensor
    lengths: tuple[int, ...]
    name_lengths: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.class_names)

    def check_fits(self, tokens_before: int, context_length: int) -> None:
        """Raise ``InputError`` that names the longest class if it does not fit behind that many tokens."""
        longest = max(range(len(self)), key=self.lengths.__getitem__)
        needed = tokens_before + self.lengths[longest]
        if needed > context_length:
            raise InputError(
                f"class name {self.class_names[longest]!r} is too long: its {self.lengths[longest]} tokens behind "
                f"{tokens_before} tokens of start and context make {needed}, and the text tower reads {context_length}"
            )


def tokenize_class_names(
    class_names: Sequence[str], suffix: str, encode: Callable[[str], list[int]], end_of_text: int
) -> ClassTokens:
    """Tokenise every name, followed by ``suffix`` and the end-of-text token.

    Args:
        class_names: C names; duplicates are allowed.
        suffix: text appended to every name, such as "." in CoOp.
        encode: text to token ids without special tokens.
        end_of_text: id of the end-of-text token.

    Raises:
        InputError: no class names, or one without any token.
    """
    if not class_names:
        raise InputError("class_names is empty: at least one class is needed")
    tokens, name_lengths = [], []
    for name in class_names:
        encoded = encode(f"{name}{suffix}")
        if not name.strip() or not encoded:
            raise InputError(f"class name {name!r} has no words")
        tokens.append([*encoded, end_of_text])
        name_lengths.append(len(encode(name)))
    flat = torch.tensor([token for name in tokens for token in name], dtype=torch.long)
    return ClassTokens(tuple(class_names), flat, tuple(len(name) for name in tokens), tuple(name_lengths))


@dataclass(frozen=True)
class Packing:
    """Where the tokens of C sequences stand in ``rows`` rows of ``width`` slots.

    Attributes:
        rows: number of rows.
        width: slots of a row.
        token: (rows * width,) index of the token in the concatenated sequences; 0 in an empty slot.
        position: (rows * width,) position of the token in its sequence; 0 in an empty slot.
        last: (C,) slot of the last token of each sequence.
        visible: (rows, width, width) bool; a token sees itself and the earlier tokens of its own sequence.
    """

    rows: int
    width: int
    token: Tensor
    position: Tensor
    last: Tensor
    visible: Tensor


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept may serve a training later
def pack(lengths: tuple[int, ...], device: torch.device) -> Packing:
    """Pack sequences into rows by first fit, longest first; the narrowest row of about ``ROW_TOKENS`` slots wins."""
    rows = -(-sum(lengths) // ROW_TOKENS)
    width = max(max(lengths), -(-sum(lengths) // rows))
    while (places := _first_fit(lengths, rows, width)) is None:
        width += 1
    token = torch.zeros(rows * width, dtype=torch.long)
    position = torch.zeros(rows * width, dtype=torch.long)
    sequence = torch.arange(-rows * width, 0)  # an empty slot belongs to nobody else, and sees itself only
    last = torch.empty(len(lengths), dtype=torch.long)
    first_token = 0
    for index, (start, length) in enumerate(zip(places, lengths, strict=True)):
        slots = slice(start, start + length)
        token[slots] = torch.arange(first_token, first_token + length)
        position[slots] = torch.arange(length)
        sequence[slots] = index
        last[index] = start + length - 1
        first_token += length
    sequence = sequence.view(rows, width)
    same = sequence[:, :, None] == sequence[:, None, :]
    visible = same & torch.ones(width, width, dtype=torch.bool).tril()
    return Packing(rows, width, token.to(device), position.to(device), last.to(device), visible.to(device))


def _first_fit(lengths: tuple[int, ...], rows: int, width: int) -> list[int] | None:
    """First slot of every sequence, or None if they do not fit."""
    used = [0] * rows
    places = [0] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r in range(rows) if used[r] + lengths[index] <= width), None)
        if row is None:
            return None
        places[index] = row * width + used[row]
        used[row] += lengths[index]
    return places


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def token_order(
    lengths: tuple[int, ...], name_lengths: tuple[int, ...], before: int, behind: int, device: torch.device
) -> Tensor:
    """Class by class: ``before`` tokens of its own, its name, ``behind`` tokens, the rest of its ``lengths``.

    Returns:
        Indices into the concatenation of all T class tokens, the C * ``before`` and the C * ``behind`` tokens.
    """
    own, order, first = sum(lengths), [], 0
    learned = own + len(lengths) * before
    for length, name in zip(lengths, name_lengths, strict=True):
        order += [*range(own, own + before), *range(first, first + name)]
        order += [*range(learned, learned + behind), *range(first + name, first + length)]
        own, learned, first = own + before, learned + behind, first + length
    return torch.tensor(order, device=device)

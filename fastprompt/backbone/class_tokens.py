"""Class names as tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastprompt.errors import InputError


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: caches are keyed by it
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

    def order(self, before: int, behind: int, device: torch.device) -> Tensor:
        """Indices that put every class together, where each brings tokens; see ``token_order``."""
        return token_order(self.lengths, self.name_lengths or self.lengths, before, behind, device)

    def split(self, sizes: Sequence[int]) -> list[ClassTokens]:
        """The same classes in several lists, ``sizes`` of them in each; the sizes sum to C."""
        pieces, start = [], 0
        ids = self.ids.split(self.lengths)
        for size in sizes:
            part = slice(start, start + size)
            lists = (self.class_names[part], torch.cat(ids[part]), self.lengths[part], self.name_lengths[part])
            pieces.append(ClassTokens(*lists))
            start += size
        return pieces

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


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is kept may serve a training later
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

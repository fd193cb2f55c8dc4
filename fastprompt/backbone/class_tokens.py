"""Class names as tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fastprompt.errors import InputError

logger = logging.getLogger(__name__)


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

    def order(self, before: int, after: int) -> Tensor:
        """Return indices that put every class together: ``before`` tokens of its own, name, ``after``, suffix and end.

        They point into the T tokens of all classes, followed by C * ``before`` and C * ``after`` learned ones.
        """
        order, first = [], 0
        own, behind = len(self.ids), len(self.ids) + len(self) * before
        for length, name in zip(self.lengths, self.name_lengths or self.lengths, strict=True):
            order += [*range(own, own + before), *range(first, first + name)]
            order += [*range(behind, behind + after), *range(first + name, first + length)]
            own, behind, first = own + before, behind + after, first + length
        return torch.tensor(order)

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

    def check_distinct(self) -> None:
        """Refuse classes that are written differently and read alike.

        The same name twice is what the caller says: ImageNet's published list has "missile" and "sunglasses" twice.
        A warning tells that such classes have the same text.

        Raises:
            InputError: the tokenizer reads two names alike ("cat" and "Cat").
        """
        first: dict[tuple[int, ...], int] = {}
        repeated = []
        for index, tokens in enumerate(self.ids.split(self.lengths)):
            other = first.setdefault(tuple(tokens.tolist()), index)
            names = self.class_names[other], self.class_names[index]
            if names[0] != names[1]:
                raise InputError(
                    f"class_names: expected names that the tokenizer tells apart, got {names[0]!r} and {names[1]!r}"
                )
            if other != index:
                repeated.append(f"{other} and {index} are both {names[0]!r}")
        if repeated:
            _warn_once(f"classes {', '.join(repeated[:3])}: a context that they share cannot tell them apart")

    def check_fits(self, tokens_before: int, context_length: int) -> None:
        """Raise ``InputError`` that names the longest class if it does not fit behind that many tokens."""
        longest = max(range(len(self)), key=self.lengths.__getitem__)
        needed = tokens_before + self.lengths[longest]
        if needed > context_length:
            raise InputError(
                f"class name {self.class_names[longest]!r} is too long: its {self.lengths[longest]} tokens behind "
                f"{tokens_before} tokens of start and context make {needed}, and the text tower reads {context_length}"
            )


@lru_cache(maxsize=32)  # a run makes its learner several times: for training, and for what comes behind it
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def check_class_names(class_names: Sequence[str]) -> tuple[str, ...]:
    """The names as a tuple.

    Raises:
        InputError: one string instead of several, something else than strings, or no name at all.
    """
    if isinstance(class_names, str):
        raise InputError(f"class_names: expected a list of names, got one string: pass [{class_names!r}]")
    if not isinstance(class_names, Sequence):
        raise InputError(f"class_names: expected a list of names, got {type(class_names).__name__}")
    if foreign := [name for name in class_names if not isinstance(name, str)]:
        raise InputError(f"class_names: expected strings, got {foreign[0]!r} ({type(foreign[0]).__name__}) among them")
    if not class_names:
        raise InputError("class_names is empty: at least one class is needed")
    return tuple(class_names)


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
        InputError: not a list of class names, or one without any token.
    """
    class_names = check_class_names(class_names)
    tokens, name_lengths = [], []
    for name in class_names:
        encoded = encode(f"{name}{suffix}")
        if not name.strip() or not encoded:
            raise InputError(f"class name {name!r} has no words")
        tokens.append([*encoded, end_of_text])
        name_lengths.append(len(encode(name)))
    flat = torch.tensor([token for name in tokens for token in name], dtype=torch.long)
    return ClassTokens(class_names, flat, tuple(len(name) for name in tokens), tuple(name_lengths))

"""The four things that prompt learning needs of a tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import open_clip
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

from fastprompt.errors import InputError


@dataclass(frozen=True)
class Tokenizer:
    """Text to token ids, and the special tokens around them.

    Attributes:
        encode: text to ids, without special tokens.
        decode: ids to text.
        start_of_text: id in front of every text, or None where the tower uses none (SigLIP).
        end_of_text: id behind every text.
        padding: id that fills the rest of a full-length sequence.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    start_of_text: int | None
    end_of_text: int
    padding: int


def read_tokenizer(tokenizer: SimpleTokenizer | HFTokenizer) -> Tokenizer:
    """The same view of CLIP's own tokenizer and of a Hugging Face one (SigLIP)."""
    if isinstance(tokenizer, SimpleTokenizer):
        return Tokenizer(tokenizer.encode, tokenizer.decode, tokenizer.sot_token_id, tokenizer.eot_token_id, padding=0)
    inner = tokenizer.tokenizer

    def encode(text: str) -> list[int]:
        return inner(tokenizer.clean_fn(text), add_special_tokens=False)["input_ids"]

    return Tokenizer(encode, inner.decode, None, inner.eos_token_id, inner.pad_token_id)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of an open_clip architecture.

    Raises:
        InputError: it needs a package that is not installed, or its files cannot be had.
    """
    try:
        return read_tokenizer(open_clip.get_tokenizer(name))
    except ModuleNotFoundError as error:
        need = f"needs the package {error.name!r}, which the extra 'siglip' of fastprompt brings"
        raise InputError(f"the tokenizer of {name!r} {need}") from error
    except OSError as error:
        raise InputError(f"the tokenizer of {name!r} could not be loaded: {error}") from error

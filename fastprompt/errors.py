"""The one exception that tells a user about bad input, and the sentence that is printed of it."""

from __future__ import annotations

from collections.abc import Collection

LONGEST = 300  # characters of a printed sentence


class InputError(ValueError):
    """Bad input, said in one sentence: which argument or file, what was expected, what came.

    The command line prints the sentence without a traceback and exits with status 2.
    """


def sentence(error: BaseException, longest: int = LONGEST) -> str:
    """Put an error into one printable line of at most ``longest`` characters.

    What is too long loses its middle: the beginning says which argument or file it is, the end what is wrong with it.
    """
    text = str(error)
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    text = printable(text)
    half = (longest - 5) // 2
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


def printable(text: str) -> str:
    """Put text into one line whose control characters are escaped, so that a file's name cannot steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in " ".join(text.split()))


def listed(names: Collection[object], most: int = 8) -> str:
    """Join names with commas, at most so many of them: "a, b, c ... and 37 more"."""
    shown = ", ".join(map(str, list(names)[:most])) or "none"
    return shown if len(names) <= most else f"{shown} ... and {len(names) - most} more"

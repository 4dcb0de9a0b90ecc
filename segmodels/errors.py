"""The one way in which a model can be wrong."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ModelError(Exception):
    """A model cannot be built, read or run.

    The message is one line: what was given, what was expected, what to do.
    """


def nearest(word: object, known: Iterable[str]) -> str:
    """`" Did you mean 'unet'?"` for the known name nearest to `word`, or `""` where none is near."""
    close = get_close_matches(str(word), list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def shorten(value: object, limit: int = 80) -> str:
    """`repr(value)` on one line, cut to `limit` characters: a message never carries a page of input."""
    text = " ".join(repr(value).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."

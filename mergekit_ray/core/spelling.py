"""'Did you mean': the nearest accepted spelling of a word that is not accepted."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(word: str, accepted: Iterable[str]) -> str | None:
    """The accepted word most like ``word``, or None if none is near."""
    found = difflib.get_close_matches(word.lower(), sorted(accepted), n=1, cutoff=0.6)
    return found[0] if found else None


def nearest(word: str, accepted: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the end of a message, or nothing."""
    found = closest(word, accepted)
    return f"; did you mean {found!r}?" if found else ""

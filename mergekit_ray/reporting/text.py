"""How lines look on a terminal: wrapped to its width with hanging indents, and coloured.

A log or a pipe gets each line whole and plain, so that ``grep`` finds what it looks for.
"""

from __future__ import annotations

import os
import re
import textwrap
from typing import IO, Any, Final

INDENT: Final = 2
"""Columns by which the rest of a wrapped line is indented more than its beginning."""

_LEAST_WIDTH: Final = 40
_BOLD: Final = 1
_COLOURS: Final = {"error": 31, "wrong": 31, "warning": 33, "note": 36}
_LABEL: Final = re.compile(rf"({'|'.join(_COLOURS)}): ")


def terminal_width(stream: IO[Any]) -> int | None:
    """Columns of the terminal that a stream writes to, ``COLUMNS`` if that is set; None if it is no terminal."""
    try:
        if not stream.isatty():
            return None
        columns = int(os.environ.get("COLUMNS") or os.get_terminal_size(stream.fileno()).columns)
    except (OSError, ValueError):  # a stream of a test or a notebook, or a COLUMNS that is no number
        return None
    return max(columns, _LEAST_WIDTH) if columns else 80


def has_colour(stream: IO[Any]) -> bool:
    """Whether a stream is a terminal that shows colours, and the user has not set ``NO_COLOR``."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return terminal_width(stream) is not None


def hanging(text: str, width: int, by: int = INDENT) -> str:
    """Each line of a text wrapped to a width, the rest of it indented by so many columns more than its beginning.

    Words are never broken: paths and names that are longer than a line can still be copied.
    """
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        lines += textwrap.wrap(
            line,
            width,
            subsequent_indent=indent + " " * by,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
    return "\n".join(lines)


def shown(text: str, stream: IO[Any]) -> str:
    """A text as a stream is to get it: on a terminal wrapped, and with a coloured label such as ``error:``."""
    width = terminal_width(stream)
    if width is not None:
        text = hanging(text, width)
    return _coloured(text) if has_colour(stream) else text


def _coloured(text: str) -> str:
    label = _LABEL.match(text)
    if label is None:
        return text
    return f"\x1b[{_BOLD};{_COLOURS[label[1]]}m{label[1]}:\x1b[0m {text[label.end() :]}"

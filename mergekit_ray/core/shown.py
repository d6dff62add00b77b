"""How objects show themselves in a notebook, as HTML."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape


def table(title: str, rows: Mapping[str, object]) -> str:
    """Named values as an HTML table of two columns; a value of several lines keeps them."""
    cells = "".join(
        f'<tr><th style="text-align:left;vertical-align:top">{escape(name)}</th>'
        f'<td style="text-align:left;white-space:pre-wrap">{escape(str(value))}</td></tr>'
        for name, value in rows.items()
    )
    return f'<table><caption style="text-align:left">{escape(title)}</caption>{cells}</table>'


def preformatted(text: str) -> str:
    """Text as HTML, unchanged."""
    return f"<pre>{escape(text)}</pre>"

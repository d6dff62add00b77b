"""Lines on a terminal and elsewhere."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import termios
from collections.abc import Iterator
from typing import IO

import pytest

from mergekit_ray.reporting.text import hanging, has_colour, shown, terminal_width

LONG = (
    "error: the models do not fit together:\n  model.layers.*.mlp.up_proj.weight (28 tensors): in /models/one, not in "
)
PATH = "/a/very/long/path/" + "x" * 90


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[IO[str]]:
    """A terminal of 60 columns."""
    for name in ("COLUMNS", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    with os.fdopen(child, "w") as stream:
        yield stream
    os.close(parent)


def test_the_width_is_the_terminals(terminal: IO[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert terminal_width(terminal) == 60
    assert terminal_width(io.StringIO()) is None
    monkeypatch.setenv("COLUMNS", "100")
    assert terminal_width(terminal) == 100
    assert terminal_width(io.StringIO()) is None


def test_lines_hang_by_their_own_indent() -> None:
    assert hanging(LONG + PATH, 50).splitlines() == [
        "error: the models do not fit together:",
        "  model.layers.*.mlp.up_proj.weight (28 tensors):",
        "    in /models/one, not in",
        f"    {PATH}",
    ]


def test_columns_and_empty_lines_are_kept() -> None:
    table = "  rank     change\n\n     4      0.907"
    assert hanging(table, 40) == table


def test_elsewhere_lines_stay_whole_and_plain(terminal: IO[str]) -> None:
    assert shown(LONG + PATH, io.StringIO()) == LONG + PATH
    on_terminal = shown(LONG + PATH, terminal)
    assert on_terminal.startswith("\x1b[1;31merror:\x1b[0m the models")
    assert max(len(line) for line in on_terminal.splitlines() if PATH not in line) <= 60


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_no_colour_where_it_is_not_wanted(
    terminal: IO[str], monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    assert has_colour(terminal)
    monkeypatch.setenv(name, value)
    assert not has_colour(terminal)
    assert shown("warning: so it is", terminal) == "warning: so it is"


def test_only_a_label_is_coloured(terminal: IO[str]) -> None:
    assert shown("no error: it is well", terminal) == "no error: it is well"
    assert shown("note: it is well", terminal) == "\x1b[1;36mnote:\x1b[0m it is well"

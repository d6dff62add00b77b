"""Commands on a terminal of their own."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Iterator
from pathlib import Path

from rich.cells import cell_len

from support.merging import COMMANDS, command_environment
from support.waiting import DEADLINE_SECONDS

CONTROL = re.compile(r"\x1b\[[\d;?]*[A-Za-z]")
"""What colours text, moves the cursor, and so on."""

COLOUR = re.compile(r"\x1b\[(?:[\d;]*;)?(?:3|4|9|10)[0-7](?:;[\d;]*)?m|\x1b\[[34]8;")


def run_on_terminal(
    command: str, *args: str | Path, width: int = 140, cwd: Path | None = None, **environment: str
) -> tuple[int, str]:
    """Run an installed command on a terminal of a width; gives its exit code and all that was shown."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    env = {**command_environment(TERM="xterm-256color"), **environment}
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        if name not in environment:
            env.pop(name, None)
    arguments = [str(COMMANDS / command), *map(str, args)]
    with subprocess.Popen(arguments, stdin=child, stdout=child, stderr=child, env=env, cwd=cwd) as process:
        os.close(child)
        shown = b"".join(_read(parent))
        code = process.wait(timeout=DEADLINE_SECONDS)
    os.close(parent)
    return code, shown.decode(errors="replace").replace("\r\n", "\n")


def plain(shown: str) -> str:
    """What is shown, without colours and movements of the cursor."""
    return CONTROL.sub("", shown)


def widest(shown: str) -> str:
    """The line that is the widest on the screen."""
    return max((line.rstrip() for line in re.split(r"[\r\n]", plain(shown))), key=cell_len)


def _read(terminal: int) -> Iterator[bytes]:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        ready, _, _ = select.select([terminal], [], [], 1.0)
        if not ready:
            continue
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # Linux: the last process on it is gone
            return
        if not data:
            return
        yield data

"""Ctrl-C and SIGTERM: the first asks for a clean stop, the second ends at once, and a stop that hangs is ended.

Before anything is open, as while a merge is planned, the first raises KeyboardInterrupt. Within `Signals.graceful` it
sets an event instead: no further shard is begun, those in work are abandoned with their temporary files and uploads,
the output is released, and the process exits with 130. If that takes longer than the grace period (a store does not
answer), the process ends at once. No reader sees the files that were open then, and the next run removes them.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final, Protocol

EXIT_CODE: Final = 130
GRACE_SECONDS: Final = 30.0
"""That shards in work have to clean up behind themselves."""

RESUME: Final = "run the same command to resume"
RESUME_CALL: Final = "make the same call again to resume"
"""The same to a caller in Python; `cli.options.in_flags` makes the one of the other."""

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_MARGIN_SECONDS: Final = 5.0
"""Beyond the time that shards have to clean up: for letting go of workers and of the output. All there is without."""


class Says(Protocol):
    """Tells the user a line."""

    def __call__(self, line: str, *, exit_code: int | None = None) -> None:
        """Tell it.

        Args:
            line: for a person.
            exit_code: that the process ends with right afterwards; None if it goes on.
        """
        ...


class Signals:
    """What this process does about signals while a command runs. Made by `listening`.

    Args:
        say: tells the user a line.
        grace_seconds: from the first signal until the process is ended come what may.
        end: ends the process at once with an exit code.
    """

    def __init__(self, say: Says, grace_seconds: float, end: Callable[[int], object]) -> None:
        self._say = say
        self._grace_seconds = grace_seconds
        self._end = end
        self._asked = False
        self._is_graceful = False
        self._stop = threading.Event()
        # Started now: a handler may interrupt the very code that starts threads, and would wait for it for ever.
        self._asks: queue.SimpleQueue[float | None] = queue.SimpleQueue()
        threading.Thread(target=self._watch, name="grace", daemon=True).start()

    @contextlib.contextmanager
    def graceful(self) -> Iterator[threading.Event]:
        """While something is open: a signal sets the event that this gives, and nothing is raised."""
        self._is_graceful = True
        try:
            yield self._stop
        finally:
            self._is_graceful = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler of `signal.signal`."""
        del frame
        name = signal.Signals(number).name
        if self._asked:
            self._end_now(f"{name}: stopped at once; {RESUME}")
            return
        self._asked = True
        seconds = self._grace_seconds if self._is_graceful else min(self._grace_seconds, _MARGIN_SECONDS)
        self._asks.put(seconds)
        if not self._is_graceful:
            raise KeyboardInterrupt
        self._stop.set()
        self._tell(f"{name}: stopping cleanly within {self._grace_seconds:.0f} s; interrupt again to stop at once")

    def close(self) -> None:
        """Listen no more. After a signal, the process is still given no longer than the grace period to end."""
        if not self._asked:
            self._asks.put(None)

    def _watch(self) -> None:
        seconds = self._asks.get()
        if seconds is not None:
            time.sleep(seconds)
            self._end_now(f"did not stop within {seconds:.0f} s and was ended; {RESUME}")

    def _tell(self, line: str, exit_code: int | None = None) -> None:
        # A terminal that is gone, or a line that is being written by what was interrupted.
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            self._say(line, exit_code=exit_code)

    def _end_now(self, message: str) -> None:
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            if sys.stderr.isatty():
                sys.stderr.write("\x1b[?25h")  # a live bar hides the cursor
        self._tell(message, EXIT_CODE)
        self._end(EXIT_CODE)


@contextlib.contextmanager
def listening(
    say: Says,
    *,
    grace_seconds: float = GRACE_SECONDS + _MARGIN_SECONDS,
    end: Callable[[int], object] = os._exit,
) -> Iterator[Signals]:
    """Have `Signals` handle SIGINT and SIGTERM until the end of the block. For the main thread of a command.

    Args:
        say: tells the user a line.
        grace_seconds: from the first signal until the process is ended come what may.
        end: ends the process at once with an exit code; nothing of Python runs afterwards.
    """
    signals = Signals(say, grace_seconds, end)
    previous = {number: signal.signal(number, signals.handle) for number in _SIGNALS}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        signals.close()

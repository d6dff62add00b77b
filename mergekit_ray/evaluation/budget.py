"""Bytes that may be held at once."""

from __future__ import annotations

import threading
from typing import Final

_POLL_SECONDS: Final = 0.1


class Budget:
    """Bytes that may be held at once. `take` waits until there is room; one taker that is alone is always let in.

    Args:
        limit_bytes: of all that take.

    Attributes:
        peak_bytes: the most that was held so far.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._held = 0
        self.peak_bytes = 0
        self._condition = threading.Condition()

    @property
    def held_bytes(self) -> int:
        """What is held now."""
        return self._held

    def take(self, num_bytes: int, stopped: threading.Event) -> None:
        """Wait for room, or for ``stopped``."""
        with self._condition:
            while self._held and self._held + num_bytes > self._limit and not stopped.is_set():
                self._condition.wait(_POLL_SECONDS)
            self._held += num_bytes
            self.peak_bytes = max(self.peak_bytes, self._held)

    def give(self, num_bytes: int) -> None:
        """Give back what was taken."""
        with self._condition:
            self._held -= num_bytes
            self._condition.notify_all()


class Share:
    """What one of several users of a budget holds of it, so that it can give back all at once when it ends.

    Args:
        budget: taken from.
    """

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._held = 0
        self._lock = threading.Lock()

    def take(self, num_bytes: int, stopped: threading.Event) -> None:
        """See `Budget.take`."""
        self._budget.take(num_bytes, stopped)
        with self._lock:
            self._held += num_bytes

    def give(self, num_bytes: int) -> None:
        """See `Budget.give`."""
        with self._lock:
            self._held -= num_bytes
        self._budget.give(num_bytes)

    def give_all(self) -> None:
        """Give back what is left."""
        self.give(self._held)

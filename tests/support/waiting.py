"""Waiting for what happens in other threads and processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

DEADLINE_SECONDS: Final = 600.0
"""For what happens at once on a machine that is not busy: only a test that hangs waits so long."""


def wait_until(condition: Callable[[], Any], seconds: float = DEADLINE_SECONDS, every: float = 0.02) -> Any:
    """What ``condition`` gives once it is true; fails the test if that never happens."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(every)
    raise AssertionError(f"did not come true within {seconds} s")

"""What this process may use of the machine."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Final

_LIMITS: Final = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says how much memory a container may take; of control groups' second version, and of the first."""


def available_cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def total_memory() -> int | None:
    """Bytes of memory of the machine, or of the container if that may take less; None where it is not told."""
    found = []
    with contextlib.suppress(ValueError, OSError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for place in _LIMITS:
        with contextlib.suppress(ValueError, OSError):  # not there, or "max"
            found.append(int(Path(place).read_text(encoding="ascii")))
    return min(found, default=None)

"""Which files are held in memory."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from mergekit_ray.storage.local.file_system import is_in_memory

SHM = Path("/dev/shm")
# Linux always has it, and so CI runs it; elsewhere nothing is told to be in memory.
needs_shm = pytest.mark.skipif(not SHM.is_dir(), reason="this system has no /dev/shm")


@needs_shm
def test_a_file_in_memory_is_told_from_others() -> None:
    with tempfile.TemporaryFile(dir=SHM) as file:
        assert is_in_memory(file.fileno())
    with Path("/proc/self/status").open("rb") as file:
        assert not is_in_memory(file.fileno())


def test_a_descriptor_that_is_closed_is_not_in_memory() -> None:
    with tempfile.TemporaryFile() as file:
        fd = os.dup(file.fileno())
    os.close(fd)
    assert not is_in_memory(fd)

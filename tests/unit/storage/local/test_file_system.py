"""Which files are held in memory, and what the server of a network file system is asked."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import pytest

from mergekit_ray.storage.local import file_system
from mergekit_ray.storage.local.file_system import is_in_memory, refresh

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


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="statx(2), which makes a client ask its server, is Linux's"
)
def test_all_folders_on_the_way_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From outside in: another machine may have made any of them."""
    libc, asked = file_system.libc(), []

    class Watched:
        def statx(self, at: int, path: bytes, flags: int, mask: int, status: object) -> int:
            answer: int = libc.statx(at, path, flags, mask, status)
            asked.append((os.fsdecode(path), answer))
            return answer

    monkeypatch.setattr(file_system, "libc", Watched)
    out = tmp_path / "out"
    (out / "a").mkdir(parents=True)
    refresh(out, out / "a" / "missing")
    assert asked == [(str(tmp_path), 0), (str(out), 0), (str(out / "a"), 0), (str(out / "a" / "missing"), -1)]

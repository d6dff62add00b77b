"""Faults of mapped files: those that are watched are caught, all others are none of ours."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from mergekit_ray.storage.local import fault_guard
from mergekit_ray.storage.local.mapped import map_file

SIZE = 64 * mmap.PAGESIZE
KEPT = 3 * mmap.PAGESIZE
"""Of a file that is cut."""

FAULT_ELSEWHERE = """
import faulthandler, mmap, os, sys
if "reports" in sys.argv:
    faulthandler.enable()
from mergekit_ray.storage.local.mapped import map_file
fd = os.open(sys.argv[1], os.O_RDWR)
ours, fault = map_file(fd, 0, os.fstat(fd).st_size)
other = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
os.ftruncate(fd, 0)
assert sum(ours) == 0 and fault.happened
print("caught", flush=True)
other[0]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"\x01" * SIZE)
    return path


def mapped(path: Path) -> tuple[memoryview, fault_guard.Fault]:
    with path.open("rb") as opened:
        return map_file(opened.fileno(), 0, SIZE)


def test_zeros_take_the_place_of_what_is_not_there(file: Path) -> None:
    data, fault = mapped(file)
    other, other_fault = mapped(file)
    os.truncate(file, KEPT)
    assert other[0] == 1
    assert not fault.happened
    assert np.frombuffer(data, np.uint8).sum() == KEPT
    assert fault.happened
    assert not other_fault.happened, "nothing of it was missed"
    assert other[KEPT] == 0
    assert other_fault.happened


def test_what_happened_is_known_when_the_mapping_is_gone_and_another_has_its_place(file: Path) -> None:
    data, fault = mapped(file)
    kept, unharmed = mapped(file)
    os.truncate(file, 0)
    assert data[0] == 0
    del data, kept
    file.write_bytes(b"\x01" * SIZE)
    again, next_fault = mapped(file)
    assert sum(again) == SIZE
    assert (fault.happened, unharmed.happened, next_fault.happened) == (True, False, False)


def test_on_any_thread_with_and_without_the_interpreters_lock(file: Path) -> None:
    many = [mapped(file) for _ in range(16)]
    os.truncate(file, KEPT)
    with ThreadPoolExecutor(8) as pool:
        sums = list(pool.map(lambda found: int(torch.frombuffer(found[0], dtype=torch.uint8).sum()), many))
    assert sums == [KEPT] * 16
    assert all(fault.happened for _, fault in many)


def test_no_slot_is_lost(file: Path) -> None:
    guard = fault_guard._guard()
    before = len(guard._free)
    held = [mapped(file) for _ in range(10)]
    assert len(guard._free) == before - 10
    held.clear()
    assert len(guard._free) == before


def test_more_than_there_are_slots_for_is_an_error_of_the_system(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault_guard._guard(), "_free", [])
    with pytest.raises(OSError, match="memory"):
        mapped(file)


@pytest.mark.parametrize("reports", [[], ["reports"]])
def test_a_fault_elsewhere_goes_to_whom_it_went_before(file: Path, reports: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FAULT_ELSEWHERE, str(file), *reports], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGBUS
    assert done.stdout == "caught\n"
    assert ("Fatal Python error: Bus error" in done.stderr) == bool(reports)

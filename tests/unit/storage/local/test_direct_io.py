"""Appending around the page cache: the bytes are the same whichever way they are written."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import threading
from pathlib import Path

import pytest

from mergekit_ray.storage.local import direct_io
from mergekit_ray.storage.local.direct_io import MIN_DIRECT_BYTES, AppendingFile


def write(path: Path, pieces: list[bytes], announced: int) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    file = AppendingFile(fd, announced)
    try:
        for piece in pieces:
            file.write(memoryview(piece))
        file.finish()
    finally:
        file.discard()
        os.close(fd)


@pytest.fixture
def pieces() -> list[bytes]:
    data = os.urandom(MIN_DIRECT_BYTES + 12345)
    bounds = [0, 1, 1, 4097, 5_000_000, 13_388_608, len(data) - 7, len(data)]
    return [data[a:b] for a, b in itertools.pairwise(bounds)]


@pytest.mark.parametrize("announced", [0, MIN_DIRECT_BYTES], ids=["ordinary", "direct"])
def test_odd_pieces_arrive_in_order_and_at_exact_length(tmp_path: Path, pieces: list[bytes], announced: int) -> None:
    write(tmp_path / "x", pieces, announced)
    assert (tmp_path / "x").read_bytes() == b"".join(pieces)


def test_an_aligned_length_is_not_padded(tmp_path: Path) -> None:
    data = os.urandom(MIN_DIRECT_BYTES)
    write(tmp_path / "x", [data], len(data))
    assert (tmp_path / "x").read_bytes() == data


def test_a_reserved_file_is_cut_to_what_was_written(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, MIN_DIRECT_BYTES + 1)
    file = AppendingFile(fd, MIN_DIRECT_BYTES + 1)
    file.write(memoryview(b"y" * (MIN_DIRECT_BYTES + 1)))
    file.finish()
    assert os.fstat(fd).st_size == MIN_DIRECT_BYTES + 1
    os.close(fd)


def test_a_file_system_that_refuses_direct_writes_gets_ordinary_ones(
    tmp_path: Path, pieces: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def refuse_direct(fd: int, data: memoryview, offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data, offset)

    monkeypatch.setattr(direct_io.os, "pwrite", refuse_direct)
    write(tmp_path / "x", pieces, MIN_DIRECT_BYTES)
    assert (tmp_path / "x").read_bytes() == b"".join(pieces)


def test_a_full_disk_is_an_error(tmp_path: Path, pieces: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct_io.os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "x", pieces, MIN_DIRECT_BYTES)


def test_nothing_is_written_once_it_was_discarded(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    file = AppendingFile(fd, MIN_DIRECT_BYTES)
    file.write(memoryview(os.urandom(MIN_DIRECT_BYTES - 5)))
    file.discard()
    file.discard()
    before = os.fstat(fd)
    os.close(fd)
    after = (tmp_path / "x").stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("direct")]


def test_a_failed_write_is_told_by_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last buffer's failure must not be lost either: `finish` tells it."""
    real = os.pwrite
    stages = itertools.count(1)

    def last_fails(fd: int, data: memoryview, offset: int) -> int:
        if next(stages) == 4:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, data, offset)

    monkeypatch.setattr(direct_io.os, "pwrite", last_fails)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "x", [os.urandom(MIN_DIRECT_BYTES)], MIN_DIRECT_BYTES)


def test_data_may_be_overwritten_once_write_has_returned(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    file = AppendingFile(fd, MIN_DIRECT_BYTES)
    buffer = bytearray(MIN_DIRECT_BYTES // 8)
    for number in range(8):
        buffer[:] = bytes([number]) * len(buffer)
        file.write(memoryview(buffer))
    file.finish()
    os.close(fd)
    assert (tmp_path / "x").read_bytes() == b"".join(bytes([number]) * len(buffer) for number in range(8))

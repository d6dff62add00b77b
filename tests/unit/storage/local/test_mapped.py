"""Ranges of local files used where they lie."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest

from mergekit_ray.core.errors import CheckpointError, StorageError
from mergekit_ray.storage.local import mapped, store
from mergekit_ray.storage.local.store import LocalStore
from mergekit_ray.storage.protocols import MappableSource

SIZE = 3 * 65_536 + 17


@pytest.fixture
def data(tmp_path: Path) -> bytes:
    written = os.urandom(SIZE)
    (tmp_path / "file").write_bytes(written)
    return written


@pytest.mark.parametrize(("start", "end"), [(0, SIZE), (1, 2), (4095, 4097), (65_536, 131_072), (65_537, SIZE)])
def test_the_bytes_are_those_of_the_file(tmp_path: Path, data: bytes, start: int, end: int) -> None:
    store = LocalStore(tmp_path)
    assert isinstance(store, MappableSource)
    assert bytes(store.map_range("file", start, end).data) == data[start:end]


def test_a_replaced_file_is_refused(tmp_path: Path, data: bytes) -> None:
    store = LocalStore(tmp_path)
    stat = store.stat("file")
    assert stat is not None
    mapped = store.map_range("file", 0, SIZE, version=stat.version)
    (tmp_path / "new").write_bytes(os.urandom(SIZE + 1))
    (tmp_path / "new").replace(tmp_path / "file")
    with pytest.raises(CheckpointError, match="changed"):
        store.map_range("file", 0, SIZE, version=stat.version)
    assert bytes(mapped.data) == data, "what was mapped before stays what it was"
    with pytest.raises(CheckpointError, match="changed"):
        mapped.check()


def test_a_file_that_is_too_short_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(CheckpointError, match="cut short"):
        LocalStore(tmp_path).map_range("file", 0, SIZE + 1)


def test_writing_to_a_mapping_does_not_reach_the_file(tmp_path: Path, data: bytes) -> None:
    LocalStore(tmp_path).map_range("file", 0, SIZE).data[:4] = b"\0\0\0\0"
    assert (tmp_path / "file").read_bytes() == data


def test_bytes_that_did_not_change_pass(tmp_path: Path, data: bytes) -> None:
    LocalStore(tmp_path).map_range("file", 0, SIZE).check()


def test_a_file_that_is_cut_while_it_is_used_is_refused(tmp_path: Path, data: bytes) -> None:
    found = LocalStore(tmp_path).map_range("file", 0, SIZE)
    os.truncate(tmp_path / "file", 100_000)
    assert bytes(found.data[:100_000]) == data[:100_000]
    assert not any(found.data[100_000:])
    with pytest.raises(CheckpointError, match="changed") as caught:
        found.check()
    assert caught.value.where == str(tmp_path / "file")


def test_a_file_that_is_written_to_while_it_is_used_is_refused(tmp_path: Path, data: bytes) -> None:
    found = LocalStore(tmp_path).map_range("file", 0, SIZE)
    with (tmp_path / "file").open("r+b") as file:
        file.write(b"other")
    os.utime(tmp_path / "file", ns=(1, 1))  # clocks of file systems may not advance for milliseconds
    with pytest.raises(CheckpointError, match="changed"):
        found.check()


def test_a_file_that_is_deleted_while_it_is_used_is_refused(tmp_path: Path, data: bytes) -> None:
    found = LocalStore(tmp_path).map_range("file", 0, SIZE)
    (tmp_path / "file").unlink()
    assert bytes(found.data) == data
    with pytest.raises(CheckpointError, match="changed"):
        found.check()


def test_what_cannot_be_read_although_nothing_changed_is_the_disks_fault(tmp_path: Path, data: bytes) -> None:
    """The kernel says the same of a disk that fails as of a file that ends."""
    path = tmp_path / "file"
    status = path.stat()
    found = LocalStore(tmp_path).map_range("file", 0, SIZE)
    os.truncate(path, 0)
    assert not any(found.data)
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(StorageError, match="Input/output error") as caught:
        found.check()
    assert caught.value.where == str(path)


@pytest.mark.parametrize(("owner", "step"), [(store, "map_file"), (mapped, "watch")], ids=["before", "in between"])
def test_a_file_that_is_cut_just_before_it_is_read_is_refused(
    tmp_path: Path, data: bytes, monkeypatch: pytest.MonkeyPatch, owner: ModuleType, step: str
) -> None:
    original = getattr(owner, step)

    def cut(*arguments: object) -> object:
        os.truncate(tmp_path / "file", 100)
        return original(*arguments)

    monkeypatch.setattr(owner, step, cut)
    with pytest.raises(CheckpointError, match="changed"):
        LocalStore(tmp_path).map_range("file", 4096, SIZE).check()  # kernels before 5.14 find out when it is used

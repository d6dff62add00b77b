"""Ranges of local files used where they lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mergekit_ray.core.errors import CheckpointError
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
    assert bytes(store.map_range("file", start, end)) == data[start:end]


def test_a_replaced_file_is_refused(tmp_path: Path, data: bytes) -> None:
    store = LocalStore(tmp_path)
    stat = store.stat("file")
    assert stat is not None
    mapped = store.map_range("file", 0, SIZE, version=stat.version)
    (tmp_path / "new").write_bytes(os.urandom(SIZE + 1))
    (tmp_path / "new").replace(tmp_path / "file")
    with pytest.raises(CheckpointError, match="changed"):
        store.map_range("file", 0, SIZE, version=stat.version)
    assert bytes(mapped) == data, "what was mapped before stays what it was"


def test_a_file_that_is_too_short_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(CheckpointError, match="cut short"):
        LocalStore(tmp_path).map_range("file", 0, SIZE + 1)


def test_writing_to_a_mapping_does_not_reach_the_file(tmp_path: Path, data: bytes) -> None:
    LocalStore(tmp_path).map_range("file", 0, SIZE)[:4] = b"\0\0\0\0"
    assert (tmp_path / "file").read_bytes() == data

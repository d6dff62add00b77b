"""Pickles that were made to harm: nothing runs, nothing grows, and the error names what was tried."""

from __future__ import annotations

import copyreg
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mergekit_ray.checkpoint.pickled.archive import MAX_PICKLE_BYTES
from mergekit_ray.checkpoint.pickled.reading import read_pinned_pickle
from mergekit_ray.core.errors import CheckpointError
from support.memory_source import MemorySource


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def read(data: bytes) -> None:
    read_pinned_pickle(MemorySource("memory", {"x.bin": data}), "x.bin")


def archive(content: bytes, records: dict[str, bytes] | None = None, **options: Any) -> bytes:
    """An archive as torch writes it, with another pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as out:
        out.writestr("x/data.pkl", content)
        out.writestr("x/byteorder", b"little")
        for name, record in (records or {}).items():
            out.writestr(name, record)
    return file.getvalue()


class Runs:
    """Its pickle calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._reduced = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._reduced


class Sets:
    """Its pickle sets a state."""

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("its state was set")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_is_called(protocol: int, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    for what in (Runs(os.system, f"touch {victim}"), Runs(eval, f"open({str(victim)!r}, 'w')"), Runs(os.mkdir, victim)):
        for value in (what, {"a": what}, [what], (what,)):
            with pytest.raises(CheckpointError, match=r"it refers to|it uses the instruction"):
                read(archive(pickle.dumps(value, protocol)))
    assert not victim.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02c" + b"posix\nsystem\nX\x02\x00\x00\x00ls\x85R.", "it refers to 'posix.system'"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x02ls\x85R.", "it refers to 'posix.system'"),
        (b"(S'ls'\nios\nsystem\n.", "the instruction STRING"),
        (b"(ios\nsystem\n.", "the instruction INST"),
        (b"(cos\nsystem\no.", "it refers to 'os.system'"),
        (b"\x80\x02\x82\x01.", "the instruction EXT1"),
        (b"\x80\x02ctorch\nSize\n)\x81.", "the instruction NEWOBJ"),
        (b"\x80\x02ctorch\nFloatStorage\nK\x01\x85R.", r"it calls 'torch\.FloatStorage'"),
        (b"\x80\x02K\x01K\x01\x85R.", "it calls a value"),
        (b"\x80\x02ccollections\nOrderedDict\n(K\x01K\x02t\x85R.", "malformed: TypeError"),
        (b"\x80\x02ctorch\nSize\n}b.", "it sets attributes of something else"),
        (b"\x80\x02X\x02\x00\x00\x00lsQ.", "it refers to something else than a storage"),
        (b"\x80\x02}(]K\x01u.", "a dictionary's key"),
        (b"\x80\x02h\x05.", "malformed: KeyError"),
        (b"\x80\x02.", "malformed: ValueError"),
        (b"\x80\x02K\x01K\x01.", "malformed: ValueError"),
        (b"\x80\x02u.", "malformed: ValueError"),
        (b"\x80\x02(.", "a "),
        (b"", "malformed: ValueError"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "malformed: ValueError"),
        (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "malformed: ValueError"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00)))tR.", "a tensor is made of something else"),
    ],
)
def test_what_torch_does_not_write(content: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(archive(content))


def test_no_state_is_set() -> None:
    with pytest.raises(CheckpointError, match=r"it refers to|instruction"):
        read(archive(pickle.dumps(copyreg.__newobj__(Sets), 2)))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02]q\x00(" + b"h\x00" * 1000 + b"e.",
        b"\x80\x02)" + b"\x85" * 200_000 + b".",
        b"\x80\x02)q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(60)) + b".",
    ],
    ids=["a list of itself", "deep", "doubling"],
)
def test_what_would_grow_does_not(content: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        read(archive(content))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64 << 20


def persistent(key: str = "0", count: int = 4, kind: str = "FloatStorage", shape: int = 4, offset: int = 0) -> bytes:
    """A dictionary of one tensor, as torch pickles it."""

    def number(value: int) -> bytes:
        return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    storage = (
        b"(" + text("storage") + b"ctorch\n" + kind.encode() + b"\n" + text(key) + text("cpu") + number(count) + b"tQ"
    )
    sizes = number(shape) + b"\x85" + number(1) + b"\x85"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + sizes + hooks + b"tR"
    return b"\x80\x02}" + text("a") + tensor + b"s."


def test_the_pickle_of_these_tests_is_read() -> None:
    read(archive(persistent(), {"x/data/0": bytes(16)}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"key": "1"}, "there is no record data/1"),
        ({"key": "../byteorder"}, "there is no record"),
        ({"count": 5}, "its storage has 20 bytes, and 16 in the file"),
        ({"count": 1 << 62}, "its storage has"),
        ({"count": -1}, "it refers to something else than a storage"),
        ({"offset": 1}, "it goes beyond its storage"),
        ({"offset": -1}, "a tensor is made of something else"),
        ({"shape": 5}, "it goes beyond its storage"),
        ({"shape": 1 << 62}, "it goes beyond its storage"),
        ({"kind": "DoubleStorage"}, "its storage has 32 bytes"),
        ({"kind": "float32"}, "it has a storage of class torch.float32"),
    ],
)
def test_places_that_contradict_the_file(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(archive(persistent(**changed), {"x/data/0": bytes(16)}))


def test_compressed_and_repeated_records() -> None:
    with pytest.raises(CheckpointError, match="is compressed"):
        read(archive(persistent(), {"x/data/0": bytes(16)}, compression=zipfile.ZIP_DEFLATED))
    plain = archive(persistent(), {"x/data/0": bytes(16), "x/data/1": bytes(16)})
    with pytest.raises(CheckpointError, match="two records of one name"):
        read(plain.replace(b"x/data/1", b"x/data/0"))


def test_a_directory_that_points_elsewhere() -> None:
    data = bytearray(archive(persistent(), {"x/data/0": bytes(16)}))
    place = data.rindex(b"PK\x01\x02")
    data[place + 42 : place + 46] = struct.pack("<I", 0)  # where the record begins
    with pytest.raises(CheckpointError, match="data/0 is not where the directory says"):
        read(bytes(data))
    data[place + 42 : place + 46] = struct.pack("<I", len(data) - 10)
    with pytest.raises(CheckpointError, match="begins beyond the end"):
        read(bytes(data))


def test_a_pickle_beyond_measure() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as out, out.open("x/data.pkl", "w") as pickled:
        for _ in range(MAX_PICKLE_BYTES // 1_000_000 + 1):
            pickled.write(bytes(1_000_000))
    with pytest.raises(CheckpointError, match="more than the 100 MB allowed"):
        read(file.getvalue())


VALID = saved({"a": torch.ones(3), "b": torch.zeros(2, 2).half(), "c": torch.nn.Parameter(torch.ones(1))})


@settings(max_examples=400, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=6))
@example(changes=[(0, 0)])
def test_changed_bytes_are_read_or_refused(changes: list[tuple[int, int]]) -> None:
    data = bytearray(VALID)
    for place, value in changes:
        data[place] = value
    try:
        read(bytes(data))
    except CheckpointError as error:
        assert error.where  # noqa: PT017 - either outcome is right


@settings(max_examples=200, deadline=None)
@given(end=st.integers(0, len(VALID) - 1))
def test_cut_files_are_refused(end: int) -> None:
    with pytest.raises(CheckpointError):
        read(VALID[:end])


@settings(max_examples=400, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_pickle_is_read_or_refused(content: bytes) -> None:
    with pytest.raises(CheckpointError):
        read(archive(content, {"x/data/0": bytes(16)}))

"""The zip archive that ``torch.save`` writes, read by ranges: its directory, its pickle, the places of its records.

    <stem>/data.pkl        what was saved, with references to records in place of tensors' bytes
    <stem>/data/<key>      the bytes of a storage, not compressed
    <stem>/byteorder       ``little`` or ``big``

Source of the format: PyTorch, "Serialization semantics" (https://docs.pytorch.org/docs/stable/notes/serialization.html),
and APPNOTE.TXT 6.3 for zip archives.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.core.sizes import format_bytes
from mergekit_ray.storage.protocols import FileStat, Source
from mergekit_ray.storage.single_file import file_uri

MAX_PICKLE_BYTES: Final = 100_000_000
"""As much as a safetensors header may have. A tensor takes some 200."""

_TAIL_BYTES: Final = 256 << 10
"""Read first: holds the directory of some 3000 records."""

_MAX_DIRECTORY_BYTES: Final = 200_000_000
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LOCAL_SIGNATURE: Final = b"PK\x03\x04"
_ENCRYPTED: Final = 0x1
_DAMAGED: Final = "the file is damaged or incomplete: download or copy it again"
SAVE_AGAIN: Final = (
    "load it where you trust it, with `torch.load(file, weights_only=True)`, and save the tensors with "
    "`safetensors.torch.save_file`"
)
_ERRORS = (
    zipfile.BadZipFile,
    ValueError,
    struct.error,
    EOFError,
    OverflowError,
    RuntimeError,  # NotImplementedError among them, for what zipfile cannot unpack
    KeyError,
)
"""What zipfile raises for archives that are not well-formed."""


@dataclass(frozen=True, slots=True)
class Record:
    """Bytes ``[start, end)`` of the file, which a storage has."""

    start: int
    end: int


@dataclass(frozen=True)
class Archive:
    """What an archive holds.

    Attributes:
        pickle: the content of ``data.pkl``.
        stat: the file as it was.
        entries: of the archive's directory, by name without the stem.
    """

    pickle: bytes
    stat: FileStat
    entries: Mapping[str, zipfile.ZipInfo]


def read_archive(source: Source, name: str) -> Archive:
    """Read directory and pickle of an archive: its end, and what lies elsewhere in one or two more requests.

    Raises:
        CheckpointError: the file is not there, or not such an archive; malformed; or too large a directory or pickle.
        StorageError: the store failed.
    """
    where = file_uri(source, name)
    head, stat = source.read_head(name, len(_LOCAL_SIGNATURE))
    if not head.startswith(_LOCAL_SIGNATURE):
        raise _not_an_archive(head, where)
    try:
        with zipfile.ZipFile(_Ranges(source, stat, where)) as archive:
            return _read(archive, stat, where)
    except _ERRORS as error:
        raise CheckpointError(f"the archive cannot be read: {error}", where=where, remedy=_DAMAGED) from error


def places(source: Source, archive: Archive, keys: Iterable[str]) -> dict[str, Record]:
    """Where in the file storages are, by the header before each.

    Args:
        source: the store that has the file.
        archive: the file.
        keys: of the storages.

    Raises:
        CheckpointError: one is not there, or its bytes are not where the archive's directory says; or the file changed.
        StorageError: the store failed.
    """
    name, where = archive.stat.name, file_uri(source, archive.stat.name)
    wanted = sorted(((key, _entry(archive, key, where)) for key in set(keys)), key=lambda each: each[1].header_offset)
    ranges, buffers = [], []
    for _, entry in wanted:
        length = _LOCAL_HEADER.size + len(entry.orig_filename.encode())
        ranges.append((entry.header_offset, entry.header_offset + length))
        buffers.append(bytearray(length))
        if ranges[-1][1] > archive.stat.num_bytes:
            raise CheckpointError(f"{entry.filename} begins beyond the end", where=where, remedy=_DAMAGED)
    source.read_ranges(name, ranges, [memoryview(buffer) for buffer in buffers], version=archive.stat.version)
    found: dict[str, Record] = {}
    last = 0
    for (key, entry), (first, end), header in zip(wanted, ranges, buffers, strict=True):
        signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(header)
        start = end + extra_bytes
        if (
            signature != _LOCAL_SIGNATURE
            or first < last
            or header[_LOCAL_HEADER.size :] != entry.orig_filename.encode()
            or name_bytes != len(header) - _LOCAL_HEADER.size
        ):
            raise CheckpointError(f"{entry.filename} is not where the directory says", where=where, remedy=_DAMAGED)
        last = start + entry.file_size
        if last > archive.stat.num_bytes:
            raise CheckpointError(f"{entry.filename} ends beyond the end", where=where, remedy=_DAMAGED)
        found[key] = Record(start, last)
    return found


def _read(archive: zipfile.ZipFile, stat: FileStat, where: str) -> Archive:
    entries = {entry.filename: entry for entry in archive.infolist()}
    if len(entries) < len(archive.infolist()):
        raise CheckpointError("the archive has two records of one name", where=where, remedy=_DAMAGED)
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise CheckpointError(
            "this is a zip archive, but nothing that torch.save wrote", where=where, remedy="check the file's name"
        )
    stem = pickles[0].removesuffix("data.pkl")
    if f"{stem}constants.pkl" in entries or any(name.startswith(f"{stem}code/") for name in entries):
        raise CheckpointError(
            "this is a TorchScript program, not a checkpoint",
            where=where,
            remedy="load it where you trust it, with torch.jit.load, and save its state_dict() with safetensors",
        )
    inside = {name.removeprefix(stem): entry for name, entry in entries.items() if name.startswith(stem)}
    order = inside.get("byteorder")
    if order is not None and (found := _content(archive, order, 64, where)) != b"little":
        raise CheckpointError(
            f"the byte order is {found[:20].decode('ascii', 'replace')!r}",
            where=where,
            remedy="save it again on a machine whose byte order is little endian",
        )
    return Archive(_content(archive, inside["data.pkl"], MAX_PICKLE_BYTES, where), stat, inside)


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, most: int, where: str) -> bytes:
    _check_plain(entry, where)
    if entry.file_size > most:
        raise CheckpointError(
            f"{entry.filename} has {format_bytes(entry.file_size)}, more than the {format_bytes(most)} allowed",
            where=where,
            remedy="save the tensors alone, or in several files",
        )
    return archive.read(entry)


def _entry(archive: Archive, key: str, where: str) -> zipfile.ZipInfo:
    entry = archive.entries.get(f"data/{key}")
    if entry is None:
        raise CheckpointError(f"there is no record data/{key[:80]}", where=where, remedy=_DAMAGED)
    _check_plain(entry, where)
    return entry


def _check_plain(entry: zipfile.ZipInfo, where: str) -> None:
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & _ENCRYPTED:
        how = "encrypted" if entry.flag_bits & _ENCRYPTED else "compressed"
        raise CheckpointError(
            f"{entry.filename} is {how}; torch.save never does that",
            where=where,
            remedy=f"this archive was packed again with another tool: {SAVE_AGAIN}",
        )
    if entry.compress_size != entry.file_size:
        raise CheckpointError(f"{entry.filename} has two sizes", where=where, remedy=_DAMAGED)


def _not_an_archive(head: bytes, where: str) -> CheckpointError:
    if head.startswith(b"\x80"):
        return CheckpointError(
            "the file is in the format of torch before 1.6, which cannot be read by ranges",
            where=where,
            remedy=f"{SAVE_AGAIN}; or `torch.save` them again",
        )
    return CheckpointError(
        "this is nothing that torch.save wrote: it is no zip archive", where=where, remedy="check the file's name"
    )


class _Ranges(io.RawIOBase):
    """A file in a store, for a reader that jumps around near its end."""

    def __init__(self, source: Source, stat: FileStat, where: str) -> None:
        self._source, self._stat, self._where = source, stat, where
        self._position = 0
        self._tail_start = max(0, stat.num_bytes - _TAIL_BYTES)
        self._tail = self._fetch(self._tail_start, stat.num_bytes)

    def _fetch(self, start: int, end: int) -> bytes:
        if end - start > _MAX_DIRECTORY_BYTES:
            raise CheckpointError(
                f"the archive's directory has {format_bytes(end - start)}, more than the "
                f"{format_bytes(_MAX_DIRECTORY_BYTES)} allowed",
                where=self._where,
                remedy=_DAMAGED,
            )
        buffer = bytearray(end - start)
        self._source.read_ranges(self._stat.name, [(start, end)], [memoryview(buffer)], version=self._stat.version)
        return bytes(buffer)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._stat.num_bytes}[whence]
        if position < 0:
            raise ValueError("before the file's beginning")
        self._position = position
        return position

    def read(self, size: int | None = -1) -> bytes:
        start = min(self._position, self._stat.num_bytes)
        end = self._stat.num_bytes if size is None or size < 0 else min(start + size, self._stat.num_bytes)
        self._position = end
        if start >= self._tail_start:
            return self._tail[start - self._tail_start : end - self._tail_start]
        return self._fetch(start, end) if end > start else b""

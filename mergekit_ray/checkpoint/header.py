"""The header of a safetensors file: read by range, believed in nothing.

Format: an unsigned little-endian 64-bit length, that many bytes of JSON (spaces may follow the object), then the
data of the tensors without gaps. Source: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_ray.checkpoint.strict_json import parse_object
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.storage.protocols import FileStat, Source
from mergekit_ray.storage.single_file import file_uri

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""

HEAD_BYTES = 256 << 10
"""Read first: holds about 2000 tensors, so that one round trip does for most files."""

_MAX_RANK = 64
MAX_NAME = 1000
"""Characters of a tensor's name."""

_MAX_DIMENSION = 2**63 - 1
_FIELDS = {"dtype", "shape", "data_offsets"}
_DTYPES = {dtype.value: dtype for dtype in DType}
_REMEDY = "the file is damaged or incomplete: download or copy it again"


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
        tensors: spec and place of each tensor, in the order of their data. Locations count from the start of the file.
        metadata: the free-form strings under ``__metadata__``.
        num_bytes: where the data begins; the header's size with its length prefix.
        left: what else the file holds that is not read, by name. Only a pickled file may hold more than tensors.
    """

    tensors: Mapping[str, tuple[TensorSpec, Location]]
    metadata: Mapping[str, str]
    num_bytes: int
    left: tuple[str, ...] = ()


def read_header(source: Source, name: str) -> Header:
    """Read the header of one file: one request, two if it is larger than `HEAD_BYTES`.

    Raises:
        CheckpointError, StorageError: see `read_pinned_header`.
    """
    return read_pinned_header(source, name)[0]


def read_pinned_header(source: Source, name: str) -> tuple[Header, FileStat]:
    """Like `read_header`, with size and version of the file it came from.

    Raises:
        CheckpointError: the file is not there, malformed, or was replaced between the two requests.
        StorageError: the store failed.
    """
    where = file_uri(source, name)
    data, stat = source.read_head(name, HEAD_BYTES)
    end = LENGTH_BYTES + header_length(data, stat.num_bytes, where)
    if end > len(data):
        rest = bytearray(end - len(data))
        source.read_ranges(name, [(len(data), end)], [memoryview(rest)], version=stat.version)
        data += rest
    return parse_header(data[:end], stat.num_bytes, name, where), stat


def header_length(data: bytes, file_num_bytes: int, where: str) -> int:
    """Bytes of JSON that follow the length prefix at the start of ``data``.

    Raises:
        CheckpointError: the file is too short, or the length is not that of a header.
    """
    if file_num_bytes < LENGTH_BYTES or len(data) < LENGTH_BYTES:
        raise CheckpointError(f"{file_num_bytes} bytes are too few for a safetensors file", where=where, remedy=_REMEDY)
    length = int.from_bytes(data[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"the header would have {length} bytes, more than the {MAX_HEADER_BYTES} allowed",
            where=where,
            remedy="this is not a safetensors file, or its first bytes are damaged",
        )
    if LENGTH_BYTES + length > file_num_bytes:
        raise CheckpointError(
            f"the header ends at byte {LENGTH_BYTES + length}, but the file has {file_num_bytes}",
            where=where,
            remedy=_REMEDY,
        )
    return length


def parse_header(data: bytes, file_num_bytes: int, file: str, where: str | None = None) -> Header:
    """Parse a header.

    Args:
        data: the start of the file, at least the whole header with its length prefix.
        file_num_bytes: size of the whole file.
        file: its name, for the locations.
        where: its full name, for messages; ``file`` by default.

    Raises:
        CheckpointError: anything that does not follow the format to the letter; names the tensor.
    """
    where = where or file
    length = header_length(data, file_num_bytes, where)
    data_start = LENGTH_BYTES + length
    if len(data) < data_start:
        raise CheckpointError(
            f"only {len(data)} of the header's {data_start} bytes are there", where=where, remedy=_REMEDY
        )
    text = data[LENGTH_BYTES:data_start]
    if not text.startswith(b"{"):
        raise CheckpointError(
            "the header does not begin with '{'", where=where, remedy="this is not a safetensors file, or it is damaged"
        )
    entries = parse_object(text, where, "safetensors header")
    metadata = _parse_metadata(entries.pop("__metadata__", None), where)
    found = [_parse_tensor(name, entry, where) for name, entry in entries.items()]
    found.sort(key=lambda item: item[1:])
    _check_cover(found, file_num_bytes - data_start, where)
    tensors = {spec.name: (spec, Location(file, data_start + start, data_start + end)) for spec, start, end in found}
    return Header(tensors, metadata, data_start)


def _parse_metadata(entry: object, where: str) -> dict[str, str]:
    if entry is None:
        return {}
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise CheckpointError("__metadata__ is not an object of strings", where=where)
    return entry


def _parse_tensor(name: str, entry: Any, where: str) -> tuple[TensorSpec, int, int]:
    """Spec and data offsets of one entry."""
    if len(name) > MAX_NAME or not name.isprintable():
        raise _fault(name, where, f"its name is longer than {MAX_NAME} characters, or holds some that cannot be shown")
    if not isinstance(entry, dict):
        raise _fault(name, where, "its entry is not an object")
    if entry.keys() != _FIELDS:
        missing, unknown = sorted(_FIELDS - entry.keys()), sorted(entry.keys() - _FIELDS)
        raise _fault(name, where, f"missing {missing}" if missing else f"unknown fields {_shorten(unknown)}")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"tensor {_shorten(name)} has dtype {_shorten(entry['dtype'])}, which cannot be read",
            where=where,
            remedy=f"supported dtypes: {', '.join(_DTYPES)}; use an unquantised copy of the model",
        )
    shape = _parse_shape(name, entry["shape"], where)
    start, end = _parse_offsets(name, entry["data_offsets"], where)
    needed = math.prod(shape) * dtype.itemsize
    if end - start != needed:
        meant = f"{dtype.value}{_shorten(list(shape))}, which needs {_shorten(needed)}"
        raise _fault(name, where, f"{_shorten(end - start)} bytes of data for {meant}")
    return TensorSpec(name, dtype, shape), start, end


def _parse_shape(name: str, shape: object, where: str) -> tuple[int, ...]:
    if not isinstance(shape, list) or len(shape) > _MAX_RANK:
        raise _fault(name, where, f"shape {_shorten(shape)} is not a list of at most {_MAX_RANK} sizes")
    for size in shape:
        if type(size) is not int or not 0 <= size <= _MAX_DIMENSION:
            raise _fault(name, where, f"shape {_shorten(shape)} holds {_shorten(size)}, which is not a size")
    return tuple(shape)


def _parse_offsets(name: str, offsets: object, where: str) -> tuple[int, int]:
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(offset) is int for offset in offsets)):
        raise _fault(name, where, f"data_offsets {_shorten(offsets)} is not a pair of offsets")
    start, end = offsets
    if not 0 <= start <= end:
        raise _fault(name, where, f"data_offsets {_shorten(offsets)} are reversed or negative")
    return start, end


def _check_cover(found: list[tuple[TensorSpec, int, int]], data_bytes: int, where: str) -> None:
    """The tensors, ascending, must cover the data section exactly."""
    position = 0
    for spec, start, end in found:
        if start < position:
            raise _fault(
                spec.name, where, f"its data begins at {start}, inside the tensor before it, which ends at {position}"
            )
        if start > position:
            raise _fault(spec.name, where, f"{_shorten(start - position)} bytes before its data belong to no tensor")
        if end > data_bytes:
            raise _fault(spec.name, where, f"its data ends at byte {_shorten(end)} of {data_bytes} in the file")
        position = end
    if position != data_bytes:
        raise CheckpointError(
            f"{data_bytes - position} bytes after the last tensor belong to none", where=where, remedy=_REMEDY
        )


def _fault(name: str, where: str, what: str) -> CheckpointError:
    return CheckpointError(f"tensor {_shorten(name)}: {what}", where=where, remedy=_REMEDY)


def _shorten(value: object) -> str:
    """``repr`` of something a file says, at a length a message can bear."""
    if isinstance(value, int) and value.bit_length() > 256:  # long before str() of an int fails
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, list) and len(value) > 8:
        return f"a list of {len(value)}"
    if isinstance(value, list):
        return f"[{', '.join(_shorten(item) for item in value)}]"
    text = repr(value) if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}…"

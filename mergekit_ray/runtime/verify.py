"""`verify`: read a published model again and compare it with its manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from mergekit_ray.checkpoint.header import read_header
from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.core.record import ShardRecord, tensor_digest
from mergekit_ray.runtime.destination import INDEX_FILE, MANIFEST_FILE
from mergekit_ray.storage.protocols import Source

_READ_BYTES: Final = 32 << 20
_MAX_JSON_BYTES: Final = 512 << 20


@dataclass
class Verification:
    """What was found.

    Attributes:
        num_shards, num_tensors, num_bytes: what was read and compared.
        problems: in words, each naming a file; empty if all is as the manifest says.
    """

    num_shards: int = 0
    num_tensors: int = 0
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)


def verify(source: Source, on_bytes: Callable[[int], None] = lambda _: None) -> Verification:
    """Check sizes, headers, index and every digest of a model made by mergekit-ray.

    Args:
        source: where the model is.
        on_bytes: told how many more bytes were read.

    Raises:
        CheckpointError: there is no manifest, so there is nothing to compare with.
        StorageError: the store failed.
    """
    result = Verification()
    manifest = _read_json(source, MANIFEST_FILE)
    if manifest is None:
        raise CheckpointError(
            f"no {MANIFEST_FILE}: this is not a published model of mergekit-ray",
            where=source.uri,
            remedy="check the path; an unfinished merge is completed by running it again",
        )
    index = _read_json(source, INDEX_FILE)
    if index is None:
        result.problems.append(f"{INDEX_FILE}: missing, so readers do not see a model")
    records = [ShardRecord.from_json(record) for record in manifest["shards"]]
    weight_map = dict(index.get("weight_map", {})) if index is not None else None
    expected = {tensor: record.file for record in records for tensor in record.tensors}
    if weight_map is not None and weight_map != expected:
        wrong = sorted(set(weight_map.items()) ^ set(expected.items()))
        result.problems.append(f"{INDEX_FILE}: does not belong to this run, first at tensor {wrong[0][0]!r}")
    listed = {record.file for record in records}
    for stat in source.list():
        if stat.name.endswith(".safetensors") and stat.name not in listed:
            result.problems.append(f"{stat.name}: not part of this model, and readers may load it instead")
    for record in records:
        _verify_shard(source, record, result, on_bytes)
    return result


def _verify_shard(source: Source, record: ShardRecord, result: Verification, on_bytes: Callable[[int], None]) -> None:
    stat = source.stat(record.file)
    if stat is None:
        result.problems.append(f"{record.file}: missing")
        return
    if stat.num_bytes != record.num_bytes:
        result.problems.append(f"{record.file}: {stat.num_bytes} bytes instead of {record.num_bytes}")
        return
    try:
        tensors = read_header(source, record.file).tensors
    except CheckpointError as error:
        result.problems.append(f"{record.file}: {error.what}")
        return
    if set(tensors) != set(record.tensors):
        result.problems.append(f"{record.file}: its header names other tensors than the manifest")
        return
    order = sorted(tensors.items(), key=lambda item: item[1][1].start)
    whole = hashlib.sha256()
    begin = min((location.start for _, location in tensors.values()), default=stat.num_bytes)
    for data in _read(source, record.file, 0, begin, stat.version):
        whole.update(data)
    for name, (spec, location) in order:
        own = tensor_digest()
        for data in _read(source, record.file, location.start, location.end, stat.version):
            own.update(data)
            whole.update(data)
            on_bytes(len(data))
        result.num_tensors += 1
        if own.hexdigest() != record.tensors[name]:
            result.problems.append(f"{record.file}: tensor {spec.name!r} is not what was written (XXH3-128 differs)")
    result.num_shards += 1
    result.num_bytes += stat.num_bytes
    if whole.hexdigest() != record.sha256:
        result.problems.append(f"{record.file}: the file is not what was written (SHA-256 differs)")


def _read(source: Source, name: str, start: int, end: int, version: str) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(_READ_BYTES, end - start)))
    for low in range(start, end, _READ_BYTES):
        part = buffer[: min(_READ_BYTES, end - low)]
        source.read_ranges(name, [(low, low + len(part))], [part], version=version)
        yield part


def _read_json(source: Source, name: str) -> dict[str, Any] | None:
    if source.stat(name) is None:
        return None
    try:
        data = json.loads(source.read(name, max_bytes=_MAX_JSON_BYTES))
    except ValueError as error:
        raise CheckpointError(f"not JSON: {error}", where=f"{source.uri}/{name}") from error
    if not isinstance(data, dict):
        raise CheckpointError("not a JSON object", where=f"{source.uri}/{name}")
    return data

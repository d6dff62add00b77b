"""Publishing: everything beside the weights, the index last. Until the index is there, no reader sees a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mergekit_ray.checkpoint.side_files import MAX_SIDE_FILE_BYTES
from mergekit_ray.core.errors import CheckpointError, StorageError
from mergekit_ray.core.plan import Plan
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.output.card import licence_of, model_card
from mergekit_ray.output.destination import CARD_FILE, MANIFEST_FILE, Destination
from mergekit_ray.output.manifest import FileDigest, manifest
from mergekit_ray.output.provenance import header_digests
from mergekit_ray.storage.protocols import PublishingSink, Source


def check_records(plan: Plan, destination: Destination, records: Mapping[str, ShardRecord]) -> None:
    """Check every shard against the plan and its record.

    Raises:
        StorageError: a shard is missing, or changed after it was written.
    """
    for shard in plan.shards:
        record = records.get(shard.file)
        stat = destination.sink.stat(shard.file)
        if record is None or stat is None or stat.num_bytes != shard.num_bytes or stat.version != record.version:
            found = "it is missing" if stat is None else f"found {stat.num_bytes} bytes, version {stat.version}"
            raise StorageError(
                f"the shard is not as it was written ({shard.num_bytes} bytes): {found}",
                where=f"{destination.sink.uri}/{shard.file}",
                remedy="something else writes to this place; run the same command again to restore the shard",
            )


def publish(
    plan: Plan, destination: Destination, records: Mapping[str, ShardRecord], sources: Mapping[str, Source]
) -> None:
    """Write config, tokenizer and other side files, card, manifest, and the index last."""
    sink = destination.sink
    files: dict[str, FileDigest] = {}

    def put(name: str, data: bytes) -> None:
        sink.put(name, data)
        files[name] = FileDigest.of(data)

    if plan.config:
        put("config.json", _json_bytes(plan.config))
    for side in plan.side_files:
        source = sources[side.model]
        stat = source.stat(side.file.name)
        if stat is None or stat.version != side.file.version:
            raise CheckpointError(
                "the file is gone or was replaced after the merge was planned",
                where=f"{source.uri}/{side.file.name}",
                remedy="run the merge again",
            )
        put(side.file.name, source.read(side.file.name, max_bytes=MAX_SIDE_FILE_BYTES))
    for name, text in plan.generated_files.items():
        put(name, text.encode())
    licences = {key: licence_of(source) for key, source in sources.items()}
    put(CARD_FILE, model_card(plan, licences).encode())
    index = _json_bytes(plan.index)
    headers = header_digests(plan.inputs, sources)
    listed = {**files, plan.index_file: FileDigest.of(index)}
    sink.put(MANIFEST_FILE, _json_bytes(manifest(plan, records, headers, listed)))
    sink.put(plan.index_file, index)
    if isinstance(sink, PublishingSink):
        sink.finish()


def _json_bytes(data: Any) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()

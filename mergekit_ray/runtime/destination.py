"""The place a merge writes to: what is already there, and whether it may be touched.

Beside the model lies ``.mergekit-ray/<plan digest>/<shard>.json``, a record of each finished shard, until the model is
published. They tell a rerun of the same plan what is done, and another plan that the place is taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from mergekit_ray.core.errors import PlanError, StorageError
from mergekit_ray.core.plan import Plan
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.storage.protocols import FileStat, Sink

INDEX_FILE: Final = "model.safetensors.index.json"
MANIFEST_FILE: Final = "mergekit-ray.json"
CARD_FILE: Final = "README.md"
RECORD_ROOT: Final = ".mergekit-ray"

_MAX_RECORD_BYTES: Final = 64 << 20

_CHECKPOINT_FILE = re.compile(
    r"[^/]*\.(safetensors|bin|pt|pth|gguf|h5|msgpack)|[^/]*\.(safetensors|bin)\.index\.json|mergekit-ray\.json"
    r"|(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab"
    r"|preprocessor_config|processor_config|chat_template)\.json|merges\.txt|vocab\.txt|tokenizer\.model"
    r"|chat_template\.jinja|README\.md|mergekit_config\.yml"
)
"""Files in a folder's root that belong to a model: what ``--overwrite`` may remove."""

_WEIGHT_FILE = re.compile(r"[^/]*\.(safetensors|bin|pt|pth|gguf|h5|msgpack)|[^/]*\.(safetensors|bin)\.index\.json")


@dataclass(frozen=True, slots=True)
class Destination:
    """What was found at the output.

    Attributes:
        sink: the store.
        record_folder: where records of this plan go.
        done: shards of this plan that are there and whole, by file name.
        published: the model is complete; there is nothing to do.
    """

    sink: Sink
    record_folder: str
    done: Mapping[str, ShardRecord]
    published: bool = False


def inspect(sink: Sink, plan: Plan, *, overwrite: bool) -> Destination:
    """Look at the output and make it ready for this plan.

    Args:
        sink: the output.
        plan: to be carried out there.
        overwrite: remove another model, or another plan's unfinished work, that is there. The old model stops being
            visible (its index goes first) before anything new is written.

    Raises:
        PlanError: the place is taken, or it holds one of the inputs.
    """
    if any(_same_place(model.uri, sink.uri) for model in plan.inputs.values()):
        raise PlanError(
            "the output is one of the inputs", where=sink.uri, remedy="write to another folder, prefix or repository"
        )
    folder = f"{RECORD_ROOT}/{plan.digest}"
    present = {stat.name: stat for stat in sink.list()}
    manifest = _read_json(sink, MANIFEST_FILE) if MANIFEST_FILE in present else None
    ours = manifest is not None and manifest.get("plan_digest") == plan.digest
    if ours and manifest is not None and INDEX_FILE in present:
        records = [ShardRecord.from_json(record) for record in manifest["shards"]]
        if all(_is_whole(record, present) for record in records):
            return Destination(sink, folder, {record.file: record for record in records}, published=True)
    records = _read_records(sink, (name for name in present if name.startswith(f"{folder}/")))
    done = {record.file: record for record in records if _is_whole(record, present)}
    foreign = _foreign(present, plan, folder, resuming=ours or any(name.startswith(f"{folder}/") for name in present))
    if foreign:
        if not overwrite:
            shown = ", ".join(foreign[:4]) + (f" and {len(foreign) - 4} more" if len(foreign) > 4 else "")
            raise PlanError(
                f"there is something else already: {shown}",
                where=sink.uri,
                remedy="choose another output, or pass --overwrite to replace it",
            )
        index_first = sorted(foreign, key=lambda name: (not name.endswith(".index.json"), name))
        sink.delete([name for name in index_first if name.endswith(".index.json")])
        sink.delete(index_first)
    return Destination(sink, folder, done)


def _foreign(present: Mapping[str, FileStat], plan: Plan, folder: str, *, resuming: bool) -> list[str]:
    """Files that this plan did not write and that a model there would be confused with."""
    shards = {shard.file for shard in plan.shards}
    ours = shards | {INDEX_FILE, MANIFEST_FILE, CARD_FILE, "config.json"} | {s.file.name for s in plan.side_files}
    found = []
    for name in present:
        if name.startswith(f"{RECORD_ROOT}/"):
            if not name.startswith(f"{folder}/"):
                found.append(name)
        elif resuming:
            # Our own unfinished work: only weights of another model beside it are in the way.
            if _WEIGHT_FILE.fullmatch(name) and name not in ours:
                found.append(name)
        elif _CHECKPOINT_FILE.fullmatch(name) or name in ours:
            found.append(name)
    return sorted(found)


def _is_whole(record: ShardRecord, present: Mapping[str, FileStat]) -> bool:
    stat = present.get(record.file)
    return stat is not None and stat.num_bytes == record.num_bytes and record.version in ("", stat.version)


def _read_records(sink: Sink, names: Iterable[str]) -> list[ShardRecord]:
    return [ShardRecord.from_json(_read_json(sink, name)) for name in names]


def _read_json(sink: Sink, name: str) -> dict[str, Any]:
    try:
        data = json.loads(sink.read(name, max_bytes=_MAX_RECORD_BYTES))
    except ValueError as error:
        raise StorageError(
            f"not JSON: {error}", where=f"{sink.uri}/{name}", remedy="remove this file, or pass --overwrite"
        ) from error
    if not isinstance(data, dict):
        raise StorageError("not a JSON object", where=f"{sink.uri}/{name}", remedy="remove this file")
    return data


def _same_place(a: str, b: str) -> bool:
    return a.rstrip("/") == b.rstrip("/")

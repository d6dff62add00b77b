"""The manifest, ``mergekit-ray.json``: what was merged from what, and the digests of all that was written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.core.plan import Plan
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.core.version import __version__
from mergekit_ray.output.destination import MANIFEST_FILE
from mergekit_ray.storage.opening import open_source
from mergekit_ray.storage.protocols import Source

_MAX_JSON_BYTES: Final = 512 << 20
_FORMAT: Final = 1
_NEEDED: Final = {"recipe": dict, "inputs": dict, "shards": list, "seed": int, "software": dict}


def manifest(plan: Plan, records: Mapping[str, ShardRecord], headers: Mapping[tuple[str, str], str]) -> dict[str, Any]:
    """What was merged from what: pinned inputs, recipe, seed, software, digests of every shard and tensor.

    Its form is that of docs/manifest.schema.json.

    Args:
        plan: what was carried out.
        records: of its shards, by file.
        headers: `provenance.header_digests` of the inputs.
    """
    return {
        "format": _FORMAT,
        "plan_digest": plan.digest,
        "software": {"mergekit-ray": __version__, "torch": metadata.version("torch")},
        "seed": plan.seed,
        "recipe": plan.recipe,
        "inputs": {
            model.reference: {
                "uri": model.uri,
                "files": {
                    f.name: {
                        "num_bytes": f.num_bytes,
                        "version": f.version,
                        **({"header_sha256": headers[key, f.name]} if (key, f.name) in headers else {}),
                    }
                    for f in model.files.values()
                },
            }
            for key, model in plan.inputs.items()
        },
        "num_parameters": plan.num_parameters,
        "dropped": dict(plan.dropped),
        "aliased": dict(plan.aliased),
        "side_files": [*(side.file.name for side in plan.side_files), *plan.generated_files],
        "shards": [_without_version(records[shard.file]) for shard in plan.shards],
    }


def _without_version(record: ShardRecord) -> dict[str, Any]:
    """A record without what differs between two places that hold the same bytes."""
    data = record.to_json()
    del data["version"]
    return data


def read_manifest(place: str) -> dict[str, Any]:
    """A manifest from its file, or from the folder or URI of a published model.

    Raises:
        CheckpointError: there is none, or it is not one.
        MergekitRayError: the place cannot be opened.
    """
    path = Path(place)
    where = place if path.is_file() else f"{place}/{MANIFEST_FILE}"
    source = open_source(str(path.absolute().parent) if path.is_file() else place)
    data = source.read(path.name if path.is_file() else MANIFEST_FILE, max_bytes=_MAX_JSON_BYTES)
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not JSON: {error}", where=where) from error
    if not isinstance(found, dict) or found.get("format") != _FORMAT:
        raise CheckpointError(
            f"not a manifest of format {_FORMAT}", where=where, remedy=f"give the {MANIFEST_FILE} of a published model"
        )
    wrong = [key for key, kind in _NEEDED.items() if not isinstance(found.get(key), kind)]
    if wrong:
        raise CheckpointError(f"a manifest without {', '.join(wrong)}", where=where, remedy="fetch it again")
    return found


def manifest_records(source: Source) -> list[ShardRecord]:
    """The shards of a published model, as its manifest lists them.

    Raises:
        CheckpointError: there is no manifest, or it is not one.
    """
    manifest = read_json(source, MANIFEST_FILE)
    if manifest is None:
        raise CheckpointError(
            f"no {MANIFEST_FILE}: this is not a published model of mergekit-ray",
            where=source.uri,
            remedy="check the path; an unfinished merge is completed by running it again",
        )
    try:
        return [ShardRecord.from_json(record) for record in manifest["shards"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            "not the manifest of a model: it names no shards",
            where=f"{source.uri}/{MANIFEST_FILE}",
            remedy="verify reads what `merge` has published",
        ) from error


def read_json(source: Source, name: str) -> dict[str, Any] | None:
    """The object in a file beside a model; None if there is no such file.

    Raises:
        CheckpointError: it holds no JSON object.
    """
    if source.stat(name) is None:
        return None
    try:
        data = json.loads(source.read(name, max_bytes=_MAX_JSON_BYTES))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not JSON: {error}", where=f"{source.uri}/{name}") from error
    if not isinstance(data, dict):
        raise CheckpointError("not a JSON object", where=f"{source.uri}/{name}")
    return data

"""The manifest, ``mergekit-ray.json``: what was merged from what, and the digests of all that was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from mergekit_ray.checkpoint.side_files import CONFIG_NAME
from mergekit_ray.checkpoint.strict_json import parse_config, parse_object
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
_OWN_DIGEST: Final = "manifest_sha256"


@dataclass(frozen=True, slots=True)
class FileDigest:
    """What a published file that is no shard holds.

    Attributes:
        num_bytes: its size.
        sha256: hex.
    """

    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, data: bytes) -> FileDigest:
        """Of a file's content."""
        return cls(len(data), hashlib.sha256(data).hexdigest())

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {"num_bytes": self.num_bytes, "sha256": self.sha256}


@dataclass(frozen=True, slots=True)
class Contents:
    """A published model, as its manifest lists it.

    Attributes:
        records: its shards.
        files: everything else but the manifest, by name; None where the manifest is too old to list it.
        side_files: names of the files that were copied or generated beside weights and config.
        is_intact: the manifest is as it was written; None where it is too old to tell.
    """

    records: list[ShardRecord]
    files: Mapping[str, FileDigest] | None
    side_files: tuple[str, ...] = ()
    is_intact: bool | None = None


def manifest(
    plan: Plan,
    records: Mapping[str, ShardRecord],
    headers: Mapping[tuple[str, str], str],
    files: Mapping[str, FileDigest],
) -> dict[str, Any]:
    """What was merged from what: pinned inputs, recipe, seed, software, digests of all files and tensors and its own.

    Its form is that of docs/manifest.schema.json.

    Args:
        plan: what was carried out.
        records: of its shards, by file.
        headers: `provenance.header_digests` of the inputs.
        files: everything else that is published, by name.
    """
    made = {
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
        "files": {name: digest.to_json() for name, digest in files.items()},
    }
    return {**made, _OWN_DIGEST: own_digest(made)}


def own_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of a manifest but for this digest, as JSON in UTF-8 with sorted keys and without spaces."""
    rest = {key: value for key, value in manifest.items() if key != _OWN_DIGEST}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def is_intact(manifest: Mapping[str, Any]) -> bool | None:
    """Whether a manifest is as it was written, by its own digest; None where it is too old to have one."""
    return None if _OWN_DIGEST not in manifest else manifest[_OWN_DIGEST] == own_digest(manifest)


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
    path = Path(place).resolve()  # a file that the user names may be a link
    where = place if path.is_file() else f"{place}/{MANIFEST_FILE}"
    source = open_source(str(path.parent) if path.is_file() else place)
    name = path.name if path.is_file() else MANIFEST_FILE
    if source.stat(name) is None:
        raise _not_published(source)
    found = parse_object(source.read(name, max_bytes=_MAX_JSON_BYTES), where, "manifest")
    if found.get("format") != _FORMAT:
        raise CheckpointError(
            f"not a manifest of format {_FORMAT}", where=where, remedy=f"give the {MANIFEST_FILE} of a published model"
        )
    wrong = [key for key, kind in _NEEDED.items() if not isinstance(found.get(key), kind)]
    if wrong:
        raise CheckpointError(f"a manifest without {', '.join(wrong)}", where=where, remedy="fetch it again")
    return found


def published_contents(source: Source) -> Contents:
    """What a published model consists of, by its manifest.

    Raises:
        CheckpointError: there is no manifest, or it is not one.
    """
    manifest = read_json(source, MANIFEST_FILE)
    if manifest is None:
        raise _not_published(source)
    try:
        records = [ShardRecord.from_json(record) for record in manifest["shards"]]
        return Contents(
            records, listed_files(manifest), tuple(map(str, manifest.get("side_files", ()))), is_intact(manifest)
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        # A record says what is wrong with it.
        what = error if isinstance(error, ValueError) else "it names no shards, or lists its files in another form"
        raise CheckpointError(
            f"not the manifest of a model: {what}",
            where=f"{source.uri}/{MANIFEST_FILE}",
            remedy="verify and attest read what `merge` has published",
        ) from error


def _not_published(source: Source) -> CheckpointError:
    return CheckpointError(
        f"no {MANIFEST_FILE}: this is not a published model of mergekit-ray",
        where=source.uri,
        remedy="check the path; an unfinished merge is completed by running it again",
    )


def listed_files(manifest: Mapping[str, Any]) -> dict[str, FileDigest] | None:
    """The files beside the shards that a manifest lists, by name; None where it is too old to.

    Raises:
        KeyError, TypeError, AttributeError: the list is not as `merge` writes it.
    """
    if "files" not in manifest:
        return None
    return {name: FileDigest(found["num_bytes"], found["sha256"]) for name, found in manifest["files"].items()}


def read_json(source: Source, name: str) -> dict[str, Any] | None:
    """The object in a file beside a model; None if there is no such file.

    Raises:
        CheckpointError: it holds no JSON object.
    """
    if source.stat(name) is None:
        return None
    data, where = source.read(name, max_bytes=_MAX_JSON_BYTES), f"{source.uri}/{name}"
    return parse_config(data, where, "file")[0] if name == CONFIG_NAME else parse_object(data, where, "file")

"""`attest`: what OpenSSF's model signing puts its signature on, for a model that was made by mergekit-ray.

An in-toto statement with the SHA-256 of every file. Those of the shards are in the model's manifest, hashed while they
were written, so that no weight is read again. All other files are read, and must be what the manifest says.

https://github.com/ossf/model-signing-spec and https://in-toto.io/Statement/v1
"""

from __future__ import annotations

import hashlib
from pathlib import PurePosixPath
from typing import Any, Final

from mergekit_ray.checkpoint.side_files import MAX_SIDE_FILE_BYTES
from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.output.destination import CARD_FILE, MANIFEST_FILE, RECORD_ROOT
from mergekit_ray.output.manifest import FileDigest, published_contents
from mergekit_ray.storage.protocols import Source

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE: Final = "https://model_signing/signature/v1.0"
_IGNORED: Final = (".git", ".gitattributes", ".github", ".gitignore")


def statement(source: Source, name: str) -> dict[str, Any]:
    """The statement for a published model, ready to be signed.

    Args:
        source: where the model is.
        name: of the model, which is the statement's subject.

    Returns:
        JSON data. The subject's digest is the SHA-256 over the digests of all files, in the order of their names.

    Raises:
        CheckpointError: there is no manifest, it was changed, or a file is not what it says. A model card may be
            edited, and files may be added: they are signed as they are.
        StorageError: the store failed.
    """
    contents = published_contents(source)
    if contents.is_intact is False:
        raise _differs(source, MANIFEST_FILE, "changed after it was written (its own digest differs)")
    shards = {record.file: record for record in contents.records}
    files = contents.files or {}
    digests: dict[str, str] = {}
    for stat in source.list():
        if PurePosixPath(stat.name).parts[0] in (*_IGNORED, RECORD_ROOT):
            continue
        shard = shards.get(stat.name)
        if shard is None:
            data = source.read(stat.name, max_bytes=MAX_SIDE_FILE_BYTES)
            found = FileDigest.of(data)
            if stat.name != CARD_FILE and files.get(stat.name, found) != found:
                raise _differs(source, stat.name, "not what was written (SHA-256 differs)")
            digests[stat.name] = found.sha256
        elif stat.num_bytes != shard.num_bytes:
            raise _differs(source, stat.name, f"{stat.num_bytes} bytes instead of {shard.num_bytes}")
        else:
            digests[stat.name] = shard.sha256
    missing = sorted((shards.keys() | files.keys()) - digests.keys() - {CARD_FILE})
    if missing:
        raise CheckpointError("missing", where=f"{source.uri}/{missing[0]}", remedy="run the merge again")
    names = sorted(digests, key=PurePosixPath)
    whole = hashlib.sha256(b"".join(bytes.fromhex(digests[file]) for file in names))
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": whole.hexdigest()}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [*_IGNORED, RECORD_ROOT],
            },
            "resources": [{"name": file, "algorithm": "sha256", "digest": digests[file]} for file in names],
        },
    }


def _differs(source: Source, name: str, what: str) -> CheckpointError:
    remedy = "see what else is wrong with `mergekit-ray verify`"
    return CheckpointError(what, where=f"{source.uri}/{name}", remedy=remedy)

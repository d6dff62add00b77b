"""What the manifest says of the inputs beyond their versions: the digests of their headers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from mergekit_ray.checkpoint.header import HEAD_BYTES, LENGTH_BYTES, header_length
from mergekit_ray.checkpoint.pickled.archive import read_archive
from mergekit_ray.checkpoint.weight_files import SAFETENSORS
from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.core.plan import InputFile, InputModel
from mergekit_ray.storage.protocols import Source
from mergekit_ray.storage.single_file import file_uri

_NUM_READERS: Final = 8


def header_digests(inputs: Mapping[str, InputModel], sources: Mapping[str, Source]) -> dict[tuple[str, str], str]:
    """SHA-256 (hex) of the header of every weight file that is read, by model key and file name.

    A header names every tensor with dtype, shape and place. It tells two checkpoints of one size apart where versions
    cannot: those of folders change when they are copied. One small request for each file.

    Args:
        inputs: of a plan, by key.
        sources: an open source by model key.

    Raises:
        CheckpointError: a file is gone, or was replaced after the merge was planned.
        StorageError: a store failed.
    """
    files = [(key, file) for key, model in inputs.items() for file in model.files.values()]
    with ThreadPoolExecutor(_NUM_READERS) as executor:
        digests = executor.map(lambda item: header_digest(sources[item[0]], item[1]), files)
        return {(key, file.name): digest for (key, file), digest in zip(files, digests, strict=True)}


def header_digest(source: Source, file: InputFile) -> str:
    """SHA-256 (hex) of a file's header, length prefix included; of a pickled file, of its pickle.

    Raises:
        CheckpointError, StorageError: see `header_digests`.
    """
    where = file_uri(source, file.name)
    is_pickled = not file.name.endswith(SAFETENSORS)
    if is_pickled:
        archive = read_archive(source, file.name)
        data, stat = archive.pickle, archive.stat
    else:
        data, stat = source.read_head(file.name, HEAD_BYTES)
    if stat.version != file.version:
        raise CheckpointError(
            "the file was replaced after the merge was planned", where=where, remedy="run the merge again"
        )
    if is_pickled:
        return hashlib.sha256(data).hexdigest()
    end = LENGTH_BYTES + header_length(data, stat.num_bytes, where)
    digest = hashlib.sha256(data[:end])
    if end > len(data):
        rest = memoryview(bytearray(end - len(data)))
        source.read_ranges(file.name, [(len(data), end)], [rest], version=stat.version)
        digest.update(rest)
    return digest.hexdigest()

"""Which files of a place hold its weights, and what their headers say: safetensors, else what torch.save pickled."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from mergekit_ray.checkpoint.diffusers import is_of_diffusers
from mergekit_ray.checkpoint.header import Header, read_pinned_header
from mergekit_ray.checkpoint.index import MAX_INDEX_BYTES, parse_index
from mergekit_ray.checkpoint.pickled.reading import read_pinned_pickle
from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.core.plan import DIFFUSERS_STEM, STEM
from mergekit_ray.core.sizes import counted
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.storage.names import PICKLED_SUFFIXES
from mergekit_ray.storage.protocols import FileStat, LinkedSource, Source
from mergekit_ray.storage.single_file import SingleFile

MAX_TENSORS = 1_000_000
"""Of a checkpoint: several times as many as any that is known has, and more than fit a plan in ordinary memory."""

SAFETENSORS = ".safetensors"
_BIN = ".bin"
_PICKLED_STEM = "pytorch_model"
_INDEX = ".index.json"
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.(?P<ending>safetensors|bin)")
_CONSOLIDATED = "consolidated"
_OF_TRAINING = re.compile(r"optimizer|scheduler|rng_state|training_args|scaler|random_states")
"""Pickled files that trainers leave beside the weights."""

Headers: TypeAlias = Mapping[str, tuple[Header, FileStat]]

_NUM_THREADS = 16
_MAX_NAMED = 5


@dataclass(slots=True)
class WeightFiles:
    """The weights of a place.

    Attributes:
        files: that hold them, pinned to their versions.
        tensors: spec and place of every tensor, by name.
        metadata: the free-form strings in the headers; the first file's where they differ.
        unindexed: see `mergekit_ray.checkpoint.opening.Checkpoint`.
        warnings: which other files are there and not read.
    """

    files: dict[str, FileStat]
    tensors: dict[str, tuple[TensorSpec, Location]]
    metadata: dict[str, str]
    unindexed: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def find_weights(
    source: Source, listing: Mapping[str, FileStat], config: Mapping[str, Any], reference: str
) -> WeightFiles:
    """The headers of the files that hold the weights.

    Args:
        source: the store.
        listing: its files by name.
        config: the content of ``config.json``; empty if there is none.
        reference: the model as the user named it, for messages.

    Raises:
        CheckpointError: there are none, or they are malformed, incomplete or contradictory.
        StorageError: the store failed.
    """
    headers: dict[str, tuple[Header, FileStat]] = {}
    found = _find(source, listing, config, reference, headers)
    if not found.tensors:
        raise CheckpointError("the weight files hold no tensors", where=_place(source, reference))
    found.warnings += [
        f"{name} of {reference} holds more than the model: {_some(header.left)} is not read"
        for name, (header, _) in headers.items()
        if header.left
    ]
    return found


def read_weight_header(source: Source, name: str) -> tuple[Header, FileStat]:
    """The header of a file of weights, by the kind that its name tells of.

    Raises:
        CheckpointError, StorageError: see `read_pinned_header` and `read_pinned_pickle`.
    """
    return (read_pinned_header if name.endswith(SAFETENSORS) else read_pinned_pickle)(source, name)


def is_of_training(name: str) -> bool:
    """Whether a pickled file, by its name, is what a trainer keeps beside the weights."""
    return _OF_TRAINING.match(name) is not None


def _find(
    source: Source,
    listing: Mapping[str, FileStat],
    config: Mapping[str, Any],
    reference: str,
    headers: dict[str, tuple[Header, FileStat]],
) -> WeightFiles:
    """See `find_weights`; adds to ``headers``."""

    def read(files: Sequence[str]) -> Headers:
        headers.update(_read_headers(source, files))
        return headers

    if isinstance(source, SingleFile):
        return _gather(read([source.name]))
    for single, index in _names(listing, config):
        if single in listing and (index not in listing or not _is_indexed(source, single, index)):
            found = _gather(read([single]))
            if index in listing:
                found.warnings.append(
                    f"{reference} holds both {single} and {index}; {single} is read, as transformers does"
                )
            return found
        if index in listing:
            return _open_indexed(source, listing, index, read)
    files, left = _find_files(source, listing, reference)
    found = _gather(read(files))
    if left:
        found.warnings.append(
            f"{reference} has no {STEM}{SAFETENSORS}{_INDEX}; {_some(files)} are read, and not {_some(left)}"
        )
    return found


def _names(listing: Mapping[str, FileStat], config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the only weight file is called, and the index of several: safetensors, then pickled ones.

    Other safetensors without an index come before pickled files.
    """
    stem, pickled = (DIFFUSERS_STEM, DIFFUSERS_STEM) if is_of_diffusers(config) else (STEM, _PICKLED_STEM)
    indexes = [name for name in listing if "/" not in name and name.endswith(_INDEX)]
    if not config and len(indexes) == 1:
        yield indexes[0].removesuffix(_INDEX), indexes[0]
    else:
        yield f"{stem}{SAFETENSORS}", f"{stem}{SAFETENSORS}{_INDEX}"
    if not _series(listing, SAFETENSORS):
        yield f"{pickled}{_BIN}", f"{pickled}{_BIN}{_INDEX}"


def _place(source: Source, reference: str) -> str:
    return source.uri if source.uri == reference else f"{reference} ({source.uri})"


def _series(listing: Mapping[str, FileStat], suffix: str | tuple[str, ...]) -> list[str]:
    """The weight files of a folder, but for an adapter's."""
    return sorted(n for n in listing if "/" not in n and n.endswith(suffix) and not n.startswith("adapter_"))


def _is_indexed(source: Source, file: str, index: str) -> bool:
    data = source.read(index, max_bytes=MAX_INDEX_BYTES)
    return file in parse_index(data, f"{source.uri}/{index}").values()


def _open_indexed(
    source: Source, listing: Mapping[str, FileStat], index: str, read: Callable[[Sequence[str]], Headers]
) -> WeightFiles:
    where = f"{source.uri}/{index}"
    weight_map = parse_index(source.read(index, max_bytes=MAX_INDEX_BYTES), where)
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if file not in listing]
    if missing:
        if isinstance(source, LinkedSource):
            source.check_links(missing.__contains__)
        raise CheckpointError(
            f"{counted(len(missing), 'weight file')} of {len(files)} missing: {_some(missing)}",
            where=source.uri,
            remedy="the checkpoint is incomplete: download or copy the rest",
        )
    headers = read(files)
    absent = [name for name, file in weight_map.items() if name not in headers[file][0].tensors]
    if absent:
        raise CheckpointError(
            f"the index names files that lack {counted(len(absent), 'tensor')}: "
            f"{_some(f'{name} in {weight_map[name]}' for name in absent)}",
            where=where,
            remedy="index and files are of different versions: download or copy both again",
        )
    tensors = {name: headers[file][0].tensors[name] for name, file in weight_map.items()}
    unindexed = [
        f"{name} (a copy in {file})" if name in weight_map else name
        for file in files
        for name in headers[file][0].tensors
        if weight_map.get(name) != file
    ]
    return WeightFiles({file: headers[file][1] for file in files}, tensors, _metadata(headers), unindexed)


def _find_files(source: Source, listing: Mapping[str, FileStat], reference: str) -> tuple[list[str], list[str]]:
    """The weight files of a folder without an index, and those that hold the same weights in another form."""
    if isinstance(source, LinkedSource):
        source.check_links(
            lambda name: "/" not in name and name.endswith(SAFETENSORS) and not name.startswith("adapter_")
        )
    files = _series(listing, SAFETENSORS) or _pickled_files(source, listing, reference)
    numbered = [match for name in files if (match := _NUMBERED.fullmatch(name))]
    for stem, count, ending in sorted({(match["stem"], match["count"], match["ending"]) for match in numbered}):
        there = {int(match["number"]) for match in numbered if (match["stem"], match["count"]) == (stem, count)}
        if len(there) < int(count):
            raise CheckpointError(
                f"there is no {stem}.{ending}{_INDEX}, and of the {int(count)} files {stem}-*-of-{count}.{ending} "
                f"only {len(there)} are there",
                where=_place(source, reference),
                remedy="the checkpoint is incomplete: download or copy the rest",
            )
    # A series that transformers wrote is the whole model; Mistral's own files stand beside it under other names.
    series = [match[0] for match in numbered if match["stem"] in (STEM, _PICKLED_STEM)]
    chosen = series or [name for name in files if not name.startswith(_CONSOLIDATED)] or files
    return chosen, [name for name in files if name not in chosen]


def _pickled_files(source: Source, listing: Mapping[str, FileStat], reference: str) -> list[str]:
    """The pickled weights of a folder without any other: a series, or a single file that can be nothing else.

    Raises:
        CheckpointError: there are none, or several.
    """
    files = [name for name in _series(listing, PICKLED_SUFFIXES) if not is_of_training(name)]
    series = [name for name in files if (match := _NUMBERED.fullmatch(name)) and match["stem"] == _PICKLED_STEM]
    if series or len(files) == 1:
        return series or files
    if files:
        raise CheckpointError(
            f"there are no safetensors files, and several that torch.save may have written: {_some(files)}",
            where=_place(source, reference),
            remedy=f"name the one to merge, with its path; a model's is called {_PICKLED_STEM}{_BIN}",
        )
    raise CheckpointError(
        "there are no safetensors files",
        where=_place(source, reference),
        remedy="a model is a folder with config.json and safetensors files",
    )


def _read_headers(source: Source, files: Sequence[str]) -> Headers:
    found: dict[str, tuple[Header, FileStat]] = {}
    num_tensors = 0
    with ThreadPoolExecutor(min(_NUM_THREADS, len(files)), thread_name_prefix="headers") as pool:
        for name, read in zip(files, pool.map(lambda name: read_weight_header(source, name), files), strict=True):
            found[name] = read
            num_tensors += len(read[0].tensors)
            if num_tensors > MAX_TENSORS:
                pool.shutdown(wait=False, cancel_futures=True)
                raise CheckpointError(
                    f"there are more than {MAX_TENSORS} tensors",
                    where=source.uri,
                    remedy="store the experts of a layer packed in one tensor, as transformers does",
                )
    return found


def _gather(headers: Headers) -> WeightFiles:
    """All tensors of all files, which must have different names."""
    weights = WeightFiles({file: stat for file, (_, stat) in headers.items()}, {}, _metadata(headers))
    for file, (header, _) in headers.items():
        for name, found in header.tensors.items():
            if name in weights.tensors:
                raise CheckpointError(
                    f"tensor {name!r} is both in {weights.tensors[name][1].file} and in {file}",
                    where=file,
                    remedy="remove the files that do not belong to the model, or add an index; to merge one file, "
                    "name it",
                )
            weights.tensors[name] = found
    return weights


def _metadata(headers: Headers) -> dict[str, str]:
    found: dict[str, str] = {}
    for header, _ in headers.values():
        found = {**header.metadata, **found}
    return found


def _some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _MAX_NAMED} more" if len(listed) > _MAX_NAMED else ""
    return ", ".join(listed[:_MAX_NAMED]) + more

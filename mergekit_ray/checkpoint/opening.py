"""Opening a checkpoint: from a store to specs and places of all tensors, by headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from mergekit_ray.checkpoint.adapter_config import ADAPTER_CONFIG_NAME
from mergekit_ray.checkpoint.diffusers import PIPELINE_NAME, is_of_diffusers, pipeline_error
from mergekit_ray.checkpoint.header import Header, read_pinned_header
from mergekit_ray.checkpoint.index import INDEX_NAME, MAX_INDEX_BYTES, parse_index
from mergekit_ray.checkpoint.sentence_transformers import is_module_file, module_folders, pickled_modules
from mergekit_ray.checkpoint.side_files import CONFIG_NAME, is_side_file
from mergekit_ray.checkpoint.strict_json import parse_config
from mergekit_ray.core.errors import CheckpointError, ModelError
from mergekit_ray.core.plan import DIFFUSERS_STEM, INDEX_SUFFIX
from mergekit_ray.core.sizes import counted
from mergekit_ray.core.spelling import nearest
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.storage.names import is_confined, is_weight_file
from mergekit_ray.storage.protocols import FileStat, LinkedSource, Source
from mergekit_ray.storage.single_file import SingleFile

SINGLE_NAME = "model.safetensors"
_SUFFIX = ".safetensors"
_MAX_CONFIG_BYTES = 16 << 20
_NUM_THREADS = 16
_MAX_NAMED = 5
_MISSPELT = 0.85
"""How like ``config.json`` a name is that was meant to be it; ``tokenizer_config.json`` has 0.69."""

MAX_TENSORS = 1_000_000
"""Of a checkpoint: several times as many as any that is known has, and more than fit a plan in ordinary memory."""

_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")
_SERIES = "model"
_CONSOLIDATED = "consolidated"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A model's files as they were when it was opened.

    Attributes:
        source: where they are.
        reference: the model as the recipe names it.
        files: the weight files, by name, pinned to their versions.
        tensors: spec and place of every tensor, by name.
        config: the content of ``config.json``; empty if there is none.
        side_files: what travels with the weights: tokenizer, templates, generation config, code, licences; of a
            sentence-transformers model its further modules.
        left_behind: names of files that belong beside them and are not copied: pickled weights of such modules.
        unindexed: names of tensors that are in a weight file but not in the index, which transformers does not load.
            They are not among ``tensors``. A second copy of an indexed tensor is named with its file.
        warnings: what the user should know, in words.
        metadata: the free-form strings in the headers of the weight files; the first file's where they differ.
        is_raw: there is no ``config.json``: nothing but their names says what the tensors are.
        single_file: the file's name, where the model is one file and not what lies beside it.
    """

    source: Source
    reference: str
    files: Mapping[str, FileStat]
    tensors: Mapping[str, tuple[TensorSpec, Location]]
    config: Mapping[str, Any]
    side_files: Sequence[FileStat]
    left_behind: Sequence[str] = ()
    unindexed: Sequence[str] = ()
    warnings: Sequence[str] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    is_raw: bool = False
    single_file: str | None = None


@dataclass(slots=True)
class _Weights:
    files: dict[str, FileStat]
    tensors: dict[str, tuple[TensorSpec, Location]]
    metadata: dict[str, str]
    unindexed: list[str] = field(default_factory=list)


def open_checkpoint(source: Source, reference: str, *, allow_raw: bool = False) -> Checkpoint:
    """Read the config, the index and all headers of a checkpoint, concurrently; no weights.

    ``model.safetensors`` is used if it is there, as transformers does; else the files of the index; else all
    safetensors files of the folder, which must then be complete and disjoint.

    Args:
        source: its store.
        reference: the model as the user named it, for messages.
        allow_raw: a single file, or a folder of weights without ``config.json``, will do.

    Raises:
        ModelError: nothing is there, ``config.json`` is missing, or it is an adapter rather than a model.
        CheckpointError: the weights are not safetensors, or malformed, incomplete or contradictory; or a file is a link
            that leads nowhere or out of the model.
        StorageError: the store failed.
    """
    listing = {file.name: file for file in source.list()}
    folders = module_folders(source, listing)

    def is_beside(name: str) -> bool:
        return is_side_file(name) or is_module_file(name, folders)

    if isinstance(source, LinkedSource):  # now, not when the weights have been merged and the tokenizer is copied
        source.check_links(lambda name: name in (CONFIG_NAME, SINGLE_NAME, INDEX_NAME) or is_beside(name))
    if not listing:
        what = "there is no such file" if isinstance(source, SingleFile) else "there are no files"
        raise ModelError(what, where=_place(source, reference), remedy="check the path or prefix")
    _check_names([name for name in listing if is_beside(name) or name.endswith(_SUFFIX)], _place(source, reference))
    is_raw = allow_raw and _is_raw(source, listing)
    config, twice = ({}, ()) if is_raw else _read_config(source, listing, reference)
    warnings = [
        f"{source.uri}/{CONFIG_NAME}: the key {key!r} occurs twice; its last value is read, as transformers does"
        for key in twice
    ]
    weights = _open_weights(source, listing, config, reference, warnings)
    if is_raw and not isinstance(source, SingleFile):
        warnings.append(f"{reference} has no {CONFIG_NAME}: its tensors are merged by their names alone")
    return Checkpoint(
        source=source,
        reference=reference,
        files=weights.files,
        tensors=weights.tensors,
        config=config,
        side_files=[file for file in listing.values() if is_beside(file.name)],
        left_behind=pickled_modules(listing, folders),
        unindexed=weights.unindexed,
        warnings=warnings,
        metadata=weights.metadata,
        is_raw=is_raw,
        single_file=source.name if isinstance(source, SingleFile) else None,
    )


def _is_raw(source: Source, listing: Mapping[str, FileStat]) -> bool:
    """Whether a place holds weights alone. A misspelt config, a pipeline and an adapter's folder are errors."""
    if isinstance(source, SingleFile):
        return True
    others = {CONFIG_NAME, PIPELINE_NAME, ADAPTER_CONFIG_NAME} & listing.keys()
    names = [name for name in listing if "/" not in name]
    is_misspelt = bool(get_close_matches(CONFIG_NAME, [name.lower() for name in names], cutoff=_MISSPELT))
    return any(is_weight_file(name) for name in names) and not others and not is_misspelt


def _check_names(names: Iterable[str], where: str) -> None:
    for name in names:
        if not is_confined(name):
            raise CheckpointError(
                f"{name!a} is not a file name in valid Unicode", where=where, remedy="rename the file, or remove it"
            )


def _open_weights(
    source: Source, listing: Mapping[str, FileStat], config: Mapping[str, Any], reference: str, warnings: list[str]
) -> _Weights:
    """The headers of the files that hold the weights; adds to ``warnings`` which others are there and not read."""
    if isinstance(source, SingleFile):
        return _with_tensors(_gather(_read_headers(source, [source.name])), source, reference)
    single, index = SINGLE_NAME, INDEX_NAME
    indexes = [name for name in listing if "/" not in name and name.endswith(INDEX_SUFFIX)]
    if not config and len(indexes) == 1:
        single, index = indexes[0].removesuffix(INDEX_SUFFIX) + _SUFFIX, indexes[0]
    if is_of_diffusers(config):
        single, index = f"{DIFFUSERS_STEM}{_SUFFIX}", f"{DIFFUSERS_STEM}{INDEX_SUFFIX}"
    if single in listing and (index not in listing or not _is_indexed(source, single, index)):
        if index in listing:
            warnings.append(f"{reference} holds both {single} and {index}; {single} is read, as transformers does")
        weights = _gather(_read_headers(source, [single]))
    elif index in listing:
        weights = _open_indexed(source, listing, index)
    else:
        files, left = _find_files(source, listing, reference)
        weights = _gather(_read_headers(source, files))
        if left:
            warnings.append(f"{reference} has no {index}; {_some(files)} are read, and not {_some(left)}")
    return _with_tensors(weights, source, reference)


def _with_tensors(weights: _Weights, source: Source, reference: str) -> _Weights:
    if not weights.tensors:
        raise CheckpointError("the weight files hold no tensors", where=_place(source, reference))
    return weights


def _place(source: Source, reference: str) -> str:
    return source.uri if source.uri == reference else f"{reference} ({source.uri})"


def _read_config(
    source: Source, listing: Mapping[str, FileStat], reference: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    where = f"{source.uri}/{CONFIG_NAME}"
    if CONFIG_NAME not in listing:
        if (
            error := pipeline_error(listing.keys(), reference, is_folder=not source.uri.startswith("hf://"))
        ) is not None:
            raise error
        if isinstance(source, SingleFile):
            raise ModelError(
                "this is a single file, and this command needs a model with its config.json",
                where=_place(source, reference),
                remedy="name the folder that holds both",
            )
        if ADAPTER_CONFIG_NAME in listing:
            raise ModelError(
                "this is a LoRA adapter, not a model",
                where=_place(source, reference),
                remedy="name the model it was trained on, with the adapter after a '+': base+adapter; to merge the "
                "tensors of adapters as they are, name their safetensors files",
            )
        raise ModelError(
            f"there is no {CONFIG_NAME}{nearest(CONFIG_NAME, listing)}",
            where=_place(source, reference),
            remedy="a model is a folder with config.json and safetensors files; check the path or prefix",
        )
    return parse_config(source.read(CONFIG_NAME, max_bytes=_MAX_CONFIG_BYTES), where)


def _is_indexed(source: Source, file: str, index: str) -> bool:
    data = source.read(index, max_bytes=MAX_INDEX_BYTES)
    return file in parse_index(data, f"{source.uri}/{index}").values()


def _open_indexed(source: Source, listing: Mapping[str, FileStat], index: str) -> _Weights:
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
    headers = _read_headers(source, files)
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
    return _Weights({file: headers[file][1] for file in files}, tensors, _metadata(headers), unindexed)


def _find_files(source: Source, listing: Mapping[str, FileStat], reference: str) -> tuple[list[str], list[str]]:
    """The weight files of a folder without an index, and those that hold the same weights in another form."""
    if isinstance(source, LinkedSource):
        source.check_links(lambda name: "/" not in name and name.endswith(_SUFFIX) and not name.startswith("adapter_"))
    files = sorted(
        name for name in listing if "/" not in name and name.endswith(_SUFFIX) and not name.startswith("adapter_")
    )
    if not files:
        pickled = sorted(name for name in listing if "/" not in name and name.endswith(_PICKLED))
        if pickled:
            raise CheckpointError(
                f"the weights are pickled ({_some(pickled)}); loading such files can run code, so they are not read",
                where=_place(source, reference),
                remedy="convert them: load the model with transformers and save it with save_pretrained()",
            )
        raise CheckpointError(
            "there are no safetensors files",
            where=_place(source, reference),
            remedy="a model is a folder with config.json and safetensors files",
        )
    numbered = [match for name in files if (match := _NUMBERED.fullmatch(name))]
    for stem, count in sorted({(match["stem"], match["count"]) for match in numbered}):
        there = {int(match["number"]) for match in numbered if (match["stem"], match["count"]) == (stem, count)}
        if len(there) < int(count):
            raise CheckpointError(
                f"there is no {INDEX_NAME}, and of the {int(count)} files {stem}-*-of-{count}{_SUFFIX} "
                f"only {len(there)} are there",
                where=_place(source, reference),
                remedy="the checkpoint is incomplete: download or copy the rest",
            )
    # A series that transformers wrote is the whole model; Mistral's own files stand beside it under other names.
    series = [match[0] for match in numbered if match["stem"] == _SERIES]
    chosen = series or [name for name in files if not name.startswith(_CONSOLIDATED)] or files
    return chosen, [name for name in files if name not in chosen]


def _read_headers(source: Source, files: Sequence[str]) -> dict[str, tuple[Header, FileStat]]:
    found: dict[str, tuple[Header, FileStat]] = {}
    num_tensors = 0
    with ThreadPoolExecutor(min(_NUM_THREADS, len(files)), thread_name_prefix="headers") as pool:
        for name, read in zip(files, pool.map(lambda name: read_pinned_header(source, name), files), strict=True):
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


def _gather(headers: Mapping[str, tuple[Header, FileStat]]) -> _Weights:
    """All tensors of all files, which must have different names."""
    weights = _Weights({file: stat for file, (_, stat) in headers.items()}, {}, _metadata(headers))
    for file, (header, _) in headers.items():
        for name, found in header.tensors.items():
            if name in weights.tensors:
                raise CheckpointError(
                    f"tensor {name!r} is both in {weights.tensors[name][1].file} and in {file}",
                    where=file,
                    remedy=f"remove the files that do not belong to the model, or add {INDEX_NAME}; to merge one file, "
                    "name it",
                )
            weights.tensors[name] = found
    return weights


def _metadata(headers: Mapping[str, tuple[Header, FileStat]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for header, _ in headers.values():
        found = {**header.metadata, **found}
    return found


def _some(names: Iterable[str]) -> str:
    """The first few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - _MAX_NAMED} more" if len(listed) > _MAX_NAMED else ""
    return ", ".join(listed[:_MAX_NAMED]) + more

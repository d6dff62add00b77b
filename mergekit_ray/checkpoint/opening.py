"""Opening a checkpoint: from a store to specs and places of all tensors, by headers alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from mergekit_ray.checkpoint.adapter_config import ADAPTER_CONFIG_NAME
from mergekit_ray.checkpoint.diffusers import PIPELINE_NAME, pipeline_error
from mergekit_ray.checkpoint.index import INDEX_NAME
from mergekit_ray.checkpoint.sentence_transformers import is_module_file, module_folders, pickled_modules
from mergekit_ray.checkpoint.side_files import CONFIG_NAME, is_side_file
from mergekit_ray.checkpoint.strict_json import parse_config
from mergekit_ray.checkpoint.weight_files import find_weights
from mergekit_ray.core.errors import CheckpointError, ModelError
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
    weights = find_weights(source, listing, config, reference)
    warnings += weights.warnings
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

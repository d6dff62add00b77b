"""What a user should know of the files that are copied beside merged weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mergekit_ray.architectures.anatomy import language_config
from mergekit_ray.checkpoint.adapter import AdaptedCheckpoint
from mergekit_ray.checkpoint.opening import Checkpoint
from mergekit_ray.checkpoint.sentence_transformers import module_settings, weights_of_modules
from mergekit_ray.checkpoint.side_files import MAX_SIDE_FILE_BYTES
from mergekit_ray.checkpoint.token_ids import token_ids
from mergekit_ray.core.errors import PlanError
from mergekit_ray.core.sizes import counted, format_bytes
from mergekit_ray.planning.lowering import Model


def check_sizes(donor: Model) -> None:
    """Check that the files beside the weights can be copied.

    Raises:
        PlanError: naming one that is too large.
    """
    for file in (side.file for side in donor.side_files):
        if file.num_bytes > MAX_SIDE_FILE_BYTES:
            raise PlanError(
                f"{file.name} has {format_bytes(file.num_bytes)}, and only files of up to "
                f"{format_bytes(MAX_SIDE_FILE_BYTES)} are copied beside the weights",
                where=f"model {donor.reference}",
                remedy="move it out of the model's folder, and copy it to the result yourself",
            )


def side_warnings(donor: Checkpoint, config: Mapping[str, Any], generated: Collection[str]) -> list[str]:
    """Warnings about what is copied, or cannot be.

    Args:
        donor: whose files they are.
        config: the output's ``config.json``.
        generated: names of files that the merge writes itself.

    Raises:
        CheckpointError, StorageError: the tokenizer of the donor's adapter could not be read.
    """
    names = [file.name for file in donor.side_files]
    found = [
        f"{name} is that of {donor.reference}: of a sentence-transformers model only the transformer is merged"
        for name in weights_of_modules(names)
    ]
    found += [
        f"{name} of {donor.reference} is pickled and not copied, and sentence-transformers misses it: load the model "
        "there and save it, which makes model.safetensors, or copy the file yourself"
        for name in donor.left_behind
    ]
    return (
        found + _token_warnings(donor, config) + _code_warnings(donor, _modules_of_code(config) - set(generated), names)
    )


def module_warnings(donor: Checkpoint, others: Sequence[Checkpoint]) -> list[str]:
    """Warnings about modules of sentence-transformers models that are set otherwise than the donor's.

    Raises:
        CheckpointError, StorageError: the config of a module could not be read.
    """
    found = []
    for other in others:
        theirs = {file.name for file in other.side_files}
        shared = [file.name for file in donor.side_files if file.name in theirs]
        own, their_own = module_settings(donor.source, shared), module_settings(other.source, shared)
        found += [
            f"{name}: {key} is {value!r} in {donor.reference}, {their_own[name][key]!r} in {other.reference}; the "
            f"result has the file of {donor.reference}"
            for name, content in own.items()
            for key, value in content.items()
            if name in their_own and key in their_own[name] and their_own[name][key] != value
        ]
    return found


def _token_warnings(donor: Checkpoint, config: Mapping[str, Any]) -> list[str]:
    """Whether the tokenizer of an adapter has tokens without embeddings, as where a padding token was added to it."""
    rows = language_config(config).get("vocab_size")
    if not isinstance(donor, AdaptedCheckpoint) or not isinstance(rows, int):
        return []
    adapter = donor.adapter.checkpoint
    ids = {number for of_file in token_ids(adapter).values() for number in of_file if number >= rows}
    if not ids:
        return []
    return [
        f"the tokenizer that was saved with {donor.adapter.where} has {counted(len(ids), 'token')} without embeddings, "
        f"from {min(ids)} on: the output has {rows} rows"
    ]


def _modules_of_code(config: Mapping[str, Any]) -> set[str]:
    """The files, or ``repository--file``, that a config's ``auto_map`` names."""
    auto_map = config.get("auto_map")
    values = list(auto_map.values()) if isinstance(auto_map, Mapping) else []
    flat = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return {f"{name.rpartition('.')[0]}.py" for name in flat if isinstance(name, str) and "." in name}


def _code_warnings(donor: Checkpoint, files: Collection[str], names: Collection[str]) -> list[str]:
    if not files:
        return []
    listed = ", ".join(sorted(files))
    found = [
        f"config.json names code of its own ({listed}), which transformers runs with trust_remote_code=True: read it "
        f"before you do; it comes from {donor.reference}"
    ]
    missing = sorted(name for name in files if name not in names and "--" not in name)
    if missing:
        found.append(f"{', '.join(missing)}: config.json names it as the model's code, but it is missing")
    return found

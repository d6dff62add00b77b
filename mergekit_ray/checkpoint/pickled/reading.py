"""The header of a file that ``torch.save`` wrote: each tensor's name, dtype, shape and place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from mergekit_ray.checkpoint.header import MAX_NAME, Header
from mergekit_ray.checkpoint.pickled.archive import SAVE_AGAIN, Record, places, read_archive
from mergekit_ray.checkpoint.pickled.machine import DTYPES, STORAGES, UNTYPED, Tensor, read_pickle
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import CheckpointError
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.storage.protocols import FileStat, Source
from mergekit_ray.storage.single_file import file_uri

_WRAPPERS: Final = ("state_dict", "model_state_dict", "model", "module", "weight", "weights", "params", "params_ema")
"""Under what trainers save a model's tensors beside others."""

_MAX_LISTED: Final = 5
_DAMAGED: Final = "the file is damaged or incomplete: download or copy it again"


def read_pinned_pickle(source: Source, name: str) -> tuple[Header, FileStat]:
    """Read where the tensors of one file lie, and its size and version. Their bytes are not read, and nothing is run.

    Tensors that share a storage (tied weights) have the same place. The header's ``num_bytes`` is 0.

    Raises:
        CheckpointError: the file is not there, is not what ``torch.save`` writes, is malformed, or was replaced
            meanwhile; its pickle refers to something else than tensors (names what); a tensor is not contiguous.
        StorageError: the store failed.
    """
    where = file_uri(source, name)
    archive = read_archive(source, name)
    tensors, left = _tensors(read_pickle(archive.pickle, where), where)
    used = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    records = places(source, archive, used)
    found = {each: _placed(each, tensor, records[tensor.storage.key], name, where) for each, tensor in tensors.items()}
    return Header(found, {"format": "pt"}, 0, left), archive.stat


def _tensors(saved: Any, where: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors by name, and what else is saved beside them."""
    if not isinstance(saved, dict):
        kind = "a tensor" if isinstance(saved, Tensor) else f"a {type(saved).__name__}"
        raise CheckpointError(
            f"the file holds {kind}, not a dictionary of tensors", where=where, remedy="save a model's state_dict()"
        )
    if any(isinstance(value, Tensor) for value in saved.values()):
        others = [key for key, value in saved.items() if not isinstance(value, Tensor)]
        if others:
            raise CheckpointError(
                f"beside tensors, the file holds {_some(others)}",
                where=where,
                remedy=f"save the tensors alone: {SAVE_AGAIN}",
            )
        return _named(saved, where), ()
    inner = {key: value for key, value in saved.items() if isinstance(value, dict) and _holds_tensors(value)}
    wanted = [key for key in _WRAPPERS if key in inner] if len(inner) != 1 else list(inner)
    if len(wanted) != 1:
        what = f"several dictionaries of tensors: {_some(inner)}" if inner else f"no tensors, but {_some(saved)}"
        raise CheckpointError(
            f"the file holds {what}", where=where, remedy=f"save the one that is the model: {SAVE_AGAIN}"
        )
    left = tuple(sorted(repr(key) for key in saved if key != wanted[0]))
    return _named(inner[wanted[0]], where), left


def _holds_tensors(value: Mapping[Any, Any]) -> bool:
    return bool(value) and all(isinstance(each, Tensor) for each in value.values())


def _named(found: Mapping[Any, Tensor], where: str) -> dict[str, Tensor]:
    for name in found:
        if not isinstance(name, str) or len(name) > MAX_NAME or not name.isprintable() or not name:
            raise CheckpointError(
                f"a tensor's name is {str(name)[:80]!a}",
                where=where,
                remedy=f"names are texts of at most {MAX_NAME} characters that can be shown",
            )
    return dict(found)


def _placed(name: str, tensor: Tensor, record: Record, file: str, where: str) -> tuple[TensorSpec, Location]:
    where = f"{where}, tensor {name!r}"
    dtype = _dtype(tensor, where)
    storage = tensor.storage
    storage_bytes = storage.count * (1 if str(storage.kind) == UNTYPED else dtype.itemsize)
    if storage_bytes != record.end - record.start:
        raise CheckpointError(
            f"its storage has {storage_bytes} bytes, and {record.end - record.start} in the file",
            where=where,
            remedy=_DAMAGED,
        )
    num_bytes = math.prod(tensor.shape) * dtype.itemsize
    start = tensor.offset * dtype.itemsize if num_bytes else 0
    _check_contiguous(tensor, where)
    if start + num_bytes > storage_bytes:
        raise CheckpointError("it goes beyond its storage", where=where, remedy=_DAMAGED)
    return TensorSpec(name, dtype, tensor.shape), Location(file, record.start + start, record.start + start + num_bytes)


def _dtype(tensor: Tensor, where: str) -> DType:
    named = tensor.dtype if tensor.dtype is not None else tensor.storage.kind
    dtype = DTYPES.get(str(named)) if tensor.dtype is not None else STORAGES.get(str(named))
    stored = STORAGES.get(str(tensor.storage.kind), dtype)
    if dtype is None or stored is not dtype:
        raise CheckpointError(
            f"its elements are of {named}, which cannot be read",
            where=where,
            remedy=f"supported dtypes: {', '.join(each.value for each in DType)}",
        )
    return dtype


def _check_contiguous(tensor: Tensor, where: str) -> None:
    if not math.prod(tensor.shape):
        return
    step = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride), strict=True):
        if size != 1 and stride != step:
            raise CheckpointError(
                "its elements are not stored one after another, in their order",
                where=where,
                remedy="load it where you trust it, and save each tensor after `.contiguous()`",
            )
        step *= size


def _some(names: Any) -> str:
    listed = [repr(name) if isinstance(name, str) else str(name)[:80] for name in names]
    more = f" and {len(listed) - _MAX_LISTED} more" if len(listed) > _MAX_LISTED else ""
    return ", ".join(each[:80] for each in listed[:_MAX_LISTED]) + more

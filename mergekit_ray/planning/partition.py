"""Expressions -> shards: pack on layer boundaries, fix every name and offset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergekit_ray.checkpoint.layout import encode_header, pack, shard_names
from mergekit_ray.core.expressions import Expression
from mergekit_ray.core.plan import STEM, OutputTensor, Shard
from mergekit_ray.core.tensors import TensorSpec


def partition(
    groups: Sequence[Sequence[TensorSpec]],
    expressions: Mapping[str, Expression],
    max_shard_bytes: int | None,
    stem: str = STEM,
    *,
    metadata: Mapping[str, str] | None = None,
    is_numbered: bool = True,
) -> tuple[Shard, ...]:
    """Pack output tensors into files.

    Args:
        groups: the output tensors in model order, a group for what comes before the layers, one for each layer, one for
            what comes after. A group is kept in one file where it fits.
        expressions: by tensor name.
        max_shard_bytes: most data bytes in a file; a larger tensor gets a file of its own. None for one file.
        stem: what the files are called before number and ending.
        metadata: of the headers, see `encode_header`.
        is_numbered: a file that is the only one has a number, too.

    Returns:
        The shards, with complete headers and every offset.
    """
    if max_shard_bytes is None:
        max_shard_bytes = max(1, sum(spec.num_bytes for group in groups for spec in group))
    packed = pack(groups, max_shard_bytes)
    names = shard_names(len(packed), stem) if is_numbered or len(packed) > 1 else [f"{stem}.safetensors"]
    shards = []
    for file, specs in zip(names, packed, strict=True):
        tensors, offset = [], 0
        for spec in specs:
            tensors.append(OutputTensor(spec, expressions[spec.name], offset, offset + spec.num_bytes))
            offset += spec.num_bytes
        shards.append(Shard(file, encode_header(specs, metadata), tuple(tensors)))
    return tuple(shards)

"""Where everything goes in the output, before any weight is read. Pure.

Within a shard, tensors lie back to back, those with wider elements first, so that each begins at a multiple of its
element size; layer groups are kept together where the shard size allows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from mergekit_ray.core.tensors import TensorSpec

_LENGTH_BYTES = 8
_ALIGN_BYTES = 8
_MIN_DIGITS = 5
_TORCH_METADATA = {"format": "pt"}


def place(specs: Sequence[TensorSpec]) -> list[tuple[int, int]]:
    """Byte ranges of tensors laid back to back in this order, from the start of the data section, end exclusive."""
    offsets = []
    start = 0
    for spec in specs:
        end = start + spec.num_bytes
        offsets.append((start, end))
        start = end
    return offsets


def encode_header(specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None) -> bytes:
    """The complete safetensors header of a file that holds ``specs`` in this order.

    Args:
        specs: in file order.
        metadata: free-form strings; ``{"format": "pt"}`` by default, which transformers wants to see.

    Returns:
        Length prefix and JSON, padded with spaces so that the data begins at a multiple of 8.

    Raises:
        ValueError: a name occurs twice, or is ``__metadata__``.
    """
    entries: dict[str, object] = {"__metadata__": dict(_TORCH_METADATA if metadata is None else metadata)}
    for spec, offsets in zip(specs, place(specs), strict=True):
        if spec.name in entries:
            raise ValueError(f"a shard cannot hold {spec.name!r} twice")
        entries[spec.name] = {"dtype": spec.dtype.value, "shape": spec.shape, "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGN_BYTES)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def pack(groups: Sequence[Sequence[TensorSpec]], max_shard_bytes: int) -> list[list[TensorSpec]]:
    """Cut tensors into shards.

    A group (one layer, say) goes whole into a shard while it fits. A group larger than a shard begins one of its own
    and is cut between tensors; what it leaves of its last shard is open to the next group. A tensor larger than a shard
    has a file of its own.

    Args:
        groups: tensors in output order. Empty groups are allowed.
        max_shard_bytes: of data, without the header.

    Returns:
        Tensors of each shard in file order (see `in_file_order`). No shard is empty.

    Raises:
        ValueError: ``max_shard_bytes`` is not positive.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes must be positive, not {max_shard_bytes}")
    packer = _Packer(max_shard_bytes)
    for group in groups:
        group_bytes = sum(spec.num_bytes for spec in group)
        if packer.free_bytes < group_bytes:
            packer.close()
        for spec in group:
            packer.add(spec)
    packer.close()
    return [in_file_order(shard) for shard in packer.shards]


def in_file_order(specs: Sequence[TensorSpec]) -> list[TensorSpec]:
    """Widest elements first, otherwise in the given order: each tensor begins at a multiple of its element size."""
    return sorted(specs, key=lambda spec: -spec.dtype.itemsize)


def shard_names(num_shards: int, stem: str = "model") -> list[str]:
    """``model-00001-of-00004.safetensors`` and so on."""
    digits = max(_MIN_DIGITS, len(str(num_shards)))
    return [f"{stem}-{number:0{digits}}-of-{num_shards:0{digits}}.safetensors" for number in range(1, num_shards + 1)]


class _Packer:
    def __init__(self, max_shard_bytes: int) -> None:
        self.shards: list[list[TensorSpec]] = []
        self._max_bytes = max_shard_bytes
        self._open: list[TensorSpec] = []
        self._open_bytes = 0

    @property
    def free_bytes(self) -> int:
        """What the open shard can still take."""
        return self._max_bytes - self._open_bytes

    def add(self, spec: TensorSpec) -> None:
        """Put a tensor into the open shard, or into the next if it does not fit."""
        if spec.num_bytes > self.free_bytes:
            self.close()
        self._open.append(spec)
        self._open_bytes += spec.num_bytes
        if self._open_bytes > self._max_bytes:
            self.close()

    def close(self) -> None:
        """End the open shard, if it holds anything."""
        if self._open:
            self.shards.append(self._open)
        self._open = []
        self._open_bytes = 0

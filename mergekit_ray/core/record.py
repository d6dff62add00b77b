"""What a finished shard leaves behind: proof of what was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import xxhash

_HEX: Final = frozenset("0123456789abcdef")


def tensor_digest() -> xxhash.xxh3_128:
    """A new digest of one tensor's data: XXH3-128.

    Not cryptographic, and an order of magnitude faster than what is: the file's SHA-256 proves that nothing was
    changed, the tensors' digests tell which of them an accident has changed.
    """
    return xxhash.xxh3_128()


def record_file(folder: str, shard_file: str) -> str:
    """Where the record of a shard is stored, in the output's folder for records."""
    return f"{folder}/{shard_file}.json"


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """Digests of one output file, hashed while it was written.

    Attributes:
        file: its name.
        num_bytes: its size.
        sha256: of the whole file, hex; what ``sha256sum`` prints.
        tensors: `tensor_digest` (hex) of each tensor's data.
        version: the store's version of the file after commit; empty where it is not known (in a manifest).
        device: the kind of processor that computed it, ``cpu`` or ``cuda``: sums may be rounded differently on another.
    """

    file: str
    num_bytes: int
    sha256: str
    tensors: Mapping[str, str]
    version: str = ""
    device: str = "cpu"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {
            "file": self.file,
            "num_bytes": self.num_bytes,
            "sha256": self.sha256,
            "tensors_xxh3_128": dict(self.tensors),
            "version": self.version,
            "device": self.device,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ShardRecord:
        """Inverse of `to_json`.

        Raises:
            ValueError: it is not the data of a record.
        """
        try:
            found = cls(
                data["file"],
                data["num_bytes"],
                data["sha256"],
                data["tensors_xxh3_128"],
                data.get("version", ""),
                data.get("device", "cpu"),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError("not the record of a shard") from error
        texts = (found.file, found.version, found.device)
        if not (
            all(isinstance(text, str) for text in texts)
            and type(found.num_bytes) is int
            and _is_hex(found.sha256, 64)
            and isinstance(found.tensors, dict)
            and all(_is_hex(digest, 32) for digest in found.tensors.values())
        ):
            raise ValueError("a value in the record of a shard is of another kind than was written")
        return found


def _is_hex(text: object, num_digits: int) -> bool:
    return isinstance(text, str) and len(text) == num_digits and set(text) <= _HEX

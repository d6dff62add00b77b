"""Sizes as people write them: ``2GB``, ``500M``, ``5GiB``, ``1000000``.

``KB``, ``MB``, ``GB``, ``TB`` and the bare ``K``, ``M``, ``G``, ``T`` are powers of 1000, as in huggingface_hub's
``max_shard_size``; ``KiB``, ``MiB``, ``GiB``, ``TiB`` are powers of 1024.
"""

from __future__ import annotations

import math
import re

_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"\s*(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?:(?P<prefix>[kmgt]?)(?P<binary>i?)b?)\s*", re.IGNORECASE)
_MAX_BYTES = 1 << 62


def parse_size(value: object) -> int:
    """The number of bytes that ``value`` names.

    Args:
        value: a whole number of bytes, or a number with one of the units above (case does not matter).

    Returns:
        Bytes, at least 1. A fraction of a byte is dropped.

    Raises:
        ValueError: not a size, zero or negative, or beyond 2**62.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"expected a size such as 2GB, 500MB or 5GiB, found {value!r}")
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if isinstance(value, str):
        if match is None or (match["binary"] and not match["prefix"]) or len(value) > 32:
            raise ValueError(f"expected a size such as 2GB, 500MB or 5GiB, found {value[:40]!r}")
        factor = (1024 if match["binary"] else 1000) ** _POWER[match["prefix"].lower()]
        digits = match["number"]
        num_bytes = int(digits) * factor if digits.isdigit() else int(float(digits) * factor)
    elif isinstance(value, float):
        if not math.isfinite(value) or not value.is_integer():
            raise ValueError(f"expected a whole number of bytes, found {value!r}")
        num_bytes = int(value)
    else:
        num_bytes = value
    if not 1 <= num_bytes <= _MAX_BYTES:
        raise ValueError(f"a size must be at least one byte and at most 2**62, found {str(value)[:40]}")
    return num_bytes


def format_size(num_bytes: int) -> str:
    """The shortest exact spelling that `parse_size` reads back: ``2GB``, ``5GiB``, ``1234567``."""
    for base, suffix in ((1000, "B"), (1024, "iB")):
        for prefix, power in (("T", 4), ("G", 3), ("M", 2), ("K", 1)):
            if num_bytes and num_bytes % base**power == 0:
                return f"{num_bytes // base**power}{prefix}{suffix}"
    return str(num_bytes)

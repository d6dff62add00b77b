"""Byte counts and other numbers as people read them."""

from __future__ import annotations


def format_bytes(num_bytes: float) -> str:
    """Decimal units, as disks, links and the Hub state sizes: ``2.20 GB``, ``31.5 MB``, ``512 B``."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            break
        value /= 1000
    digits = 0 if unit == "B" else 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number of things: ``1 shard``, ``1,024 shards``, ``2 matrices``.

    Args:
        number: of things.
        noun: what one of them is called.
        plural: what several are called, if that is not ``noun`` with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"

"""Sizes and spellings in messages."""

from __future__ import annotations

import pytest

from mergekit_ray.core.sizes import counted, format_bytes
from mergekit_ray.core.spelling import closest, nearest


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (512, "512 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (9994, "9.99 kB"),
        (9996, "10.0 kB"),
        (31_500_000, "31.5 MB"),
        (99_960_000, "100 MB"),
        (999_400_000, "999 MB"),
        (999_600_000, "1.00 GB"),
        (2_200_000_000, "2.20 GB"),
        (3_250_000_000_000, "3.25 TB"),
        (5e15, "5000 TB"),
        (-1500, "-1.50 kB"),
    ],
)
def test_format_bytes(num_bytes: float, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_closest() -> None:
    methods = ["dare_ties", "linear", "slerp", "ties"]
    assert closest("tise", methods) == "ties"
    assert closest("LINEAR", methods) == "linear"
    assert closest("passthrough", methods) is None
    assert nearest("slrp", methods) == "; did you mean 'slerp'?"
    assert nearest("passthrough", methods) == ""


def test_one_is_singular() -> None:
    assert [counted(n, "shard") for n in (0, 1, 2, 1024)] == ["0 shards", "1 shard", "2 shards", "1,024 shards"]
    assert [counted(n, "matrix", "matrices") for n in (1, 3)] == ["1 matrix", "3 matrices"]

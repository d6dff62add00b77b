"""What options may be."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_ray.core.errors import ConfigError
from mergekit_ray.operations.options import MergeOptions

COUNTS = ("num_workers", "memory_bytes", "chunk_elements")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            (name, value)
            for name in ("num_workers", "memory_bytes", "chunk_elements")
            for value in (0, -3, "2", 2.5, True)
        ),
        ("executor", "foo"),
        ("executor", "RAY"),
        ("address", 6379),
        ("device", None),
        ("overwrite", "no"),
        ("allow_non_finite", None),
    ],
)
def test_what_none_can_be_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"MergeOptions: {name} is {value!r}"):
        MergeOptions(**{name: value})


def test_what_each_can_be_is_taken() -> None:
    MergeOptions("ray", "auto", 2, 1 << 30, overwrite=True, allow_non_finite=True, chunk_elements=1, device="cuda:1")

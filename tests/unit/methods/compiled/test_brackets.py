"""What is gathered between two magnitudes, and the n-th largest of it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ray.methods.compiled import brackets

UNSIGNED = [np.uint16, np.uint32, np.uint64]


def magnitudes(size: int, dtype: type[np.unsignedinteger]) -> np.ndarray:
    return np.random.default_rng(size).integers(0, np.iinfo(dtype).max // 2, size, dtype)


@pytest.mark.parametrize("dtype", UNSIGNED)
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.2, 0.3), (0.5, 0.5), (1.0, 1.0), (0.0, 0.0)])
def test_gathers_what_is_between_in_order(dtype: type[np.unsignedinteger], low: float, high: float) -> None:
    patterns = magnitudes(1001, dtype)
    ascending = np.sort(patterns)
    lowest, highest = ascending[int(1000 * low)], ascending[int(1000 * high)]
    kept = np.zeros_like(patterns)
    num_above, num_high, num_low, num_kept = brackets.collect(patterns, np.uint64(lowest), np.uint64(highest), kept)
    assert num_above == (patterns > highest).sum()
    assert num_high == (patterns == highest).sum() > 0
    assert num_low == (0 if low == high else (patterns == lowest).sum())
    assert np.array_equal(kept[:num_kept], patterns[(patterns > lowest) & (patterns < highest)])


@pytest.mark.parametrize("dtype", UNSIGNED)
@pytest.mark.parametrize("rank", [1, 2, 500, 999, 1000])
@pytest.mark.parametrize("num_distinct", [1, 3, 1000])
def test_nth_largest(dtype: type[np.unsignedinteger], rank: int, num_distinct: int) -> None:
    patterns = magnitudes(1000, dtype)
    patterns = patterns[np.arange(1000) % num_distinct]
    pattern, num_above = brackets.nth_largest(patterns, rank)
    assert pattern == np.sort(patterns)[-rank]
    assert num_above == (patterns > pattern).sum()


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=30), st.data())
def test_nth_largest_of_any_numbers(values: list[int], data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, len(values)))
    pattern, num_above = brackets.nth_largest(np.array(values, np.uint64), rank)
    assert int(pattern) == sorted(values)[-rank]
    assert num_above == sum(value > int(pattern) for value in values)

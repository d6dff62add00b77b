"""Inner products of numbers in memory, beside a plain sum over the same lanes."""

from __future__ import annotations

import itertools
import platform

import numpy as np
import pytest

from mergekit_ray.core.dtypes import DType
from mergekit_ray.methods.compiled import native, products
from mergekit_ray.methods.compiled.products import LANES, inner_products


def lane_sums(x: np.ndarray, y: np.ndarray) -> float:
    """``Σ x_i y_i``: element ``i`` of the whole rounds to lane ``i % LANES``, the rest to the first lane."""
    products = x.astype(np.float64) * y.astype(np.float64)
    even = products.size // LANES * LANES
    lanes = np.zeros(LANES)
    for row in products[:even].reshape(-1, LANES):
        lanes += row
    for product in products[even:]:
        lanes[0] += product
    return float(sum(lanes.tolist()))


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("has_base", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("size", [1, 31, 32, 77, 512, 1300])
def test_inner_products_of_all_pairs(number: int, size: int, has_base: bool, width: int) -> None:
    rng = np.random.default_rng(1000 * number + size)
    values = rng.standard_normal((number + 1, size)).astype(np.float32)
    values.view(np.uint32)[:] &= np.uint32(0xFFFF0000)  # as a bfloat16 holds them
    stored = values if width == 4 else (values.view(np.uint32) >> 16).astype(np.uint16)
    rows = [*stored[1:], stored[0]] if has_base else stored[1:]
    addresses = np.array([row.ctypes.data for row in rows], dtype=np.int64)
    part = 512
    dtypes = [DType.F32 if width == 4 else DType.BF16] * len(rows)
    found = inner_products(addresses, dtypes, size, part, has_base=has_base)
    assert found.shape == (-(-size // part), number * (number + 1) // 2)
    changes = values[1:] - values[0] if has_base else values[1:]
    for index, sums in enumerate(found):
        run = changes[:, index * part : (index + 1) * part]
        pairs = itertools.combinations_with_replacement(range(number), 2)
        expected = [lane_sums(run[i], run[j]) for i, j in pairs]
        # Products are exact, and lanes add in order: fused or not, with one rounding each.
        assert sums.tolist() == expected


def test_the_bits_depend_neither_on_the_dtypes_nor_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers that every dtype holds; with fused products and wide vectors, and without."""
    rng = np.random.default_rng(1)
    values = (rng.integers(-128, 128, (4, 1300)) / 64).astype(np.float32)
    bfloat16 = (values[1].view(np.uint32) >> 16).astype(np.uint16)
    stored = [values[0].astype(np.float16), bfloat16, values[2], values[3].astype(np.float64)]
    addresses = np.array([x.ctypes.data for x in stored], np.int64)
    found = [
        inner_products(np.array([x.ctypes.data for x in values], np.int64), [DType.F32] * 4, 1300, 512, has_base=True)
    ]
    for processor in (native.processor(), ("generic" if platform.machine() == "aarch64" else "x86-64", "")):
        products._adder.cache_clear()
        monkeypatch.setattr(native, "processor", lambda: processor)  # noqa: B023 - called in the same turn
        found.append(inner_products(addresses, [DType.F16, DType.BF16, DType.F32, DType.F64], 1300, 512, has_base=True))
    products._adder.cache_clear()
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[1], found[2])

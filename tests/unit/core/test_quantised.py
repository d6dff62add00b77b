"""Expressions of codes: specs, what is read for any run, and what is no number."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ray.core.declaration import Access
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import BlockScaled, Cast, Load, Merge, Mxfp4, from_json, is_copy, loads, to_json
from mergekit_ray.core.expressions.quantised import non_finite_codes
from mergekit_ray.core.tensors import Location, TensorSpec


def load(dtype: DType, *shape: int, name: str = "w") -> Load:
    spec = TensorSpec(name, dtype, shape)
    return Load("m0", spec, Location("f", 0, spec.num_bytes))


def scaled(codes: tuple[int, ...], scales: tuple[int, ...], block: tuple[int, ...]) -> BlockScaled:
    return BlockScaled(load(DType.F8_E4M3, *codes), load(DType.F32, *scales, name="s"), block)


def packed(num_matrices: int, num_columns: int, num_groups: int) -> Mxfp4:
    blocks = load(DType.U8, num_matrices, num_columns, num_groups, 16, name="x_blocks")
    return Mxfp4(blocks, load(DType.U8, num_matrices, num_columns, num_groups, name="x_scales"), "x")


def test_results_are_float32_of_the_dequantised_shape() -> None:
    assert scaled((300, 500), (3, 4), (128, 128)).spec == TensorSpec("w", DType.F32, (300, 500))
    assert packed(4, 10, 3).spec == TensorSpec("x", DType.F32, (4, 96, 10))


@pytest.mark.parametrize("tree", [scaled((4, 6), (4, 1), (1, 6)), packed(2, 3, 1)])
def test_they_are_elementwise_no_copies_and_let_bad_values_show(tree: Any) -> None:
    assert tree.access is Access.ELEMENTWISE
    assert not is_copy(tree)
    assert tree.propagates_non_finite
    assert list(loads(Cast(tree, DType.BF16))) == list(tree.children())
    assert from_json(json.loads(json.dumps(to_json(tree)))) == tree


@pytest.mark.parametrize("tag", ["block_scaled", "mxfp4"])
def test_codes_and_scales_are_read_from_files(tag: str) -> None:
    leaf = load(DType.F8_E4M3, 2, 2)
    with pytest.raises(ValueError, match="read from files"):
        from_json([tag, to_json(Cast(leaf, DType.F32)), to_json(leaf), [1, 1]])


@st.composite
def grids(draw: Any) -> tuple[BlockScaled, np.ndarray[Any, Any]]:
    """An expression, and the flat index of the scale of each element."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=0, max_size=4)))
    if draw(st.booleans()):
        return scaled(shape, (), shape), np.zeros(shape, dtype=int)
    block = tuple(1 if i < len(shape) - 2 else draw(st.integers(1, 9)) for i in range(len(shape)))
    grid = tuple(-(-size // b) for size, b in zip(shape, block, strict=True))
    index = np.arange(math.prod(grid)).reshape(grid)
    for axis, (size, b) in enumerate(zip(shape, block, strict=True)):
        index = np.take(index, np.arange(size) // b, axis=axis)
    return scaled(shape, (math.prod(grid),), block), index


@given(grids(), st.data())
def test_a_run_needs_its_codes_and_all_their_scales(
    case: tuple[BlockScaled, np.ndarray[Any, Any]], data: st.DataObject
) -> None:
    tree, scale_of = case
    start = data.draw(st.integers(0, scale_of.size))
    stop = data.draw(st.integers(start, scale_of.size))
    needed = {each.spec.name: (first, last) for each, first, last in tree.needs(start, stop)}
    assert needed["w"] == (start, stop)
    if start == stop:
        assert "s" not in needed
        return
    first, last = needed["s"]
    used = scale_of.reshape(-1)[start:stop]
    assert 0 <= first <= used.min()
    assert used.max() < last <= tree.scales.spec.num_elements
    # No more than whole rows of blocks.
    assert last - first <= len(np.unique(used // tree.grid.width)) * tree.grid.width


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.data())
def test_a_run_of_packed_codes_needs_the_matrices_it_touches(e: int, n: int, g: int, data: st.DataObject) -> None:
    tree, matrix = packed(e, n, g), 32 * g * n
    start = data.draw(st.integers(0, e * matrix))
    stop = data.draw(st.integers(start, e * matrix))
    needed = {each.spec.name: (first, last) for each, first, last in tree.needs(start, stop)}
    if start == stop:
        assert not needed
        return
    first, last = start // matrix, (stop - 1) // matrix + 1
    assert needed == {
        "x_blocks": (first * n * g * 16, last * n * g * 16),
        "x_scales": (first * n * g, last * n * g),
    }


def test_matrices_are_computed_whole() -> None:
    """A window that ended within a matrix would have it read once more for the next."""
    assert packed(3, 10, 2).unit == 10 * 2 * 32
    assert Cast(packed(3, 10, 2), DType.BF16).unit == 10 * 2 * 32
    assert scaled((300, 500), (3, 4), (128, 128)).unit == 1


@pytest.mark.parametrize(
    ("shape", "block", "message"),
    [
        ((4, 6), (2,), "do not divide"),
        ((4, 6), (0, 2), "do not divide"),
        ((3, 4, 6), (2, 4, 6), "extend over several matrices"),
    ],
)
def test_blocks_that_cannot_be(shape: tuple[int, ...], block: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _ = scaled(shape, (1,), block).grid


def test_which_codes_are_no_numbers() -> None:
    fp8, fp4 = scaled((2, 2), (), (2, 2)), packed(1, 1, 1)
    wide = BlockScaled(load(DType.F8_E5M2, 2, 2, name="v"), load(DType.F32, name="s"), (2, 2))
    tree = Merge(
        "linear", TensorSpec("o", DType.F32, (2, 2)), (fp8, Cast(fp4, DType.BF16)), wide, {}, ({}, {}), ("", "")
    )
    assert non_finite_codes(tree) == {
        fp8.codes: {0x7F, 0xFF},
        fp4.scales: {0xFF},
        fp4.blocks: set(),
        wide.codes: {0x7C, 0x7D, 0x7E, 0x7F, 0xFC, 0xFD, 0xFE, 0xFF},
    }

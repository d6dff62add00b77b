"""Inner products of whole tensors (gram.py), and statistics along their rows and columns (rows.py)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_ray.methods.shared.gram import (
    gram_matrix,
    inner_products,
    length,
    num_products,
    products,
    span_coefficients,
)
from mergekit_ray.methods.shared.protocol import BLOCK_ELEMENTS, Chunk
from mergekit_ray.methods.shared.rows import Lines, pieces, row_sums
from support.operands import MemoryOperands


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 7, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS + 1, 2 * BLOCK_ELEMENTS + 40_000])
def test_gram_matrix(size: int) -> None:
    xs = randn(3, size)
    matrix = gram_matrix(MemoryOperands(list(xs)))
    expected = xs.double() @ xs.double().T
    assert torch.allclose(torch.tensor(matrix, dtype=torch.float64), expected, rtol=1e-13, atol=1e-12 * size)
    assert matrix == [list(column) for column in zip(*matrix, strict=True)]


def test_products_of_short_numbers_are_exact() -> None:
    """Of float32 too: 24 bits by 24 bits are 48."""
    x, y = torch.tensor([1 + 2**-23, 3e38, -1e-45]), torch.tensor([1 - 2**-24, 3e38, 1e-45])
    operands = MemoryOperands([x, y])
    exact = [Fraction(float(a)) * Fraction(float(b)) for a, b in zip(x, y, strict=True)]
    found = operands.block(0, lambda chunk: [product.tolist() for product in products(chunk)])
    assert [Fraction(value) for value in found[1]] == exact
    assert inner_products(operands)[1] == pytest.approx(9e76, rel=1e-6)


def test_task_vectors_where_there_is_a_base() -> None:
    base, *xs = randn(3, 100)
    matrix = gram_matrix(MemoryOperands(xs, base))
    deltas = torch.stack([x - base for x in xs]).double()
    assert torch.allclose(torch.tensor(matrix, dtype=torch.float64), deltas @ deltas.T, rtol=1e-13, atol=1e-13)


def test_pairs_are_the_upper_triangle_row_by_row() -> None:
    xs = [torch.tensor([value]) for value in (2.0, 3.0, 5.0)]
    assert inner_products(MemoryOperands(xs)) == [4.0, 6.0, 10.0, 9.0, 15.0, 25.0]
    assert [num_products(count) for count in (1, 2, 3)] == [1, 3, 6]


def test_an_empty_tensor_has_products_of_zero() -> None:
    assert gram_matrix(MemoryOperands([torch.empty(0), torch.empty(0)])) == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    "bad", [[math.nan, 1.0], [math.inf, 1.0], [-math.inf, 1.0], [math.inf, -math.inf], [1e200, 1e200]]
)
def test_what_is_not_finite_is_nan_throughout(bad: list[float]) -> None:
    """As are coefficients that would be calculated from it; infinities of both signs are no error of their own."""
    x = torch.tensor(bad, dtype=torch.float64)
    operands = MemoryOperands([torch.ones(2, dtype=torch.float64), x], compute_dtype=torch.float64)
    assert all(map(math.isnan, inner_products(operands)))

    def never(_: Any) -> list[float]:
        raise AssertionError("asked for a rule of NaN")

    assert all(map(math.isnan, span_coefficients(operands, never)))


def test_inner_products_do_not_depend_on_threads() -> None:
    operands = MemoryOperands(list(randn(2, 150_000)))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(inner_products(operands))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_length_of_what_cancels_is_not_imaginary() -> None:
    third = 1 / 3
    matrix = [[third, third], [third, third]]
    assert length([0.1 + 0.2, -0.3], matrix) < 1e-8


@settings(max_examples=300, deadline=None)
@given(start=st.integers(0, 100), size=st.integers(0, 100), row_length=st.integers(1, 40))
def test_pieces_are_the_run(start: int, size: int, row_length: int) -> None:
    run = torch.arange(start, start + size)
    cut = pieces(start, start + size, row_length)
    assert len(cut) <= 3
    seen = []
    for piece in cut:
        values = piece.of(run)
        rows = torch.arange(piece.rows.start, piece.rows.stop)
        columns = torch.arange(piece.columns.start, piece.columns.stop)
        assert torch.equal(values, rows[:, None] * row_length + columns)
        seen.append(values.reshape(-1))
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.int64), *seen]), run)


SHAPES = [(), (1,), (5,), (4, 3), (3, 4, 5), (1, 7), (7, 1), (300, 1000), (2, 300_001), (300_001, 2), (3, 5, 30_000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("are_rows", [True, False])
def test_sums_along_lines(shape: tuple[int, ...], are_rows: bool) -> None:
    x, y = randn(*shape, seed=1), randn(*shape, seed=2)
    lines = (Lines.along_last if are_rows else Lines.along_first)(shape)
    found = lines.sums(MemoryOperands([x, y]), products, 3)
    assert found.dtype == torch.float64
    a, b = (v.double().numpy().reshape(shape or (1,)) for v in (x, y))
    expected = np.stack([(p * q).sum(axis=-1 if are_rows else 0).reshape(-1) for p, q in ((a, a), (a, b), (b, b))])
    assert found.shape == expected.shape == (3, lines.num_lines)
    assert np.allclose(found.numpy(), expected, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("shape", [(50, 40_000), (3, 300_001), (40_000, 50), (90_001, 3)], ids=str)
@pytest.mark.parametrize("are_rows", [True, False])
def test_sums_along_lines_do_not_depend_on_threads(shape: tuple[int, ...], are_rows: bool) -> None:
    lines = (Lines.along_last if are_rows else Lines.along_first)(shape)
    operands = MemoryOperands([randn(*shape)])
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(lines.sums(operands, products, 1))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_lines_see_each_block_once() -> None:
    operands = MemoryOperands([randn(3, 200_000)])
    for lines in (Lines.along_last((3, 200_000)), Lines.along_first((3, 200_000))):
        operands.blocks_read = 0
        lines.sums(operands, products, 1)
        assert operands.blocks_read == 3


def test_terms_may_be_anything_of_a_chunk() -> None:
    def ones(chunk: Chunk) -> Iterator[torch.Tensor]:
        yield chunk.scratch.like(chunk.inputs[0], torch.float64).fill_(1.0)

    operands = MemoryOperands([torch.zeros(700, 501)])
    assert Lines.along_last((700, 501)).sums(operands, ones, 1).tolist() == [[501.0] * 700]
    assert Lines.along_first((700, 501)).sums(operands, ones, 1).tolist() == [[700.0] * 501]


@pytest.mark.parametrize("start", [0, 3, 7, 14, 20])
@pytest.mark.parametrize("size", [1, 4, 7, 15, 20])
def test_factors_of_lines(start: int, size: int) -> None:
    matrix = torch.arange(40.0).view(8, 5)
    by_row, by_column = torch.arange(8.0), torch.arange(5.0)
    for lines, factors, expected in (
        (Lines.along_last((8, 5)), by_row, matrix * by_row[:, None]),
        (Lines.along_first((8, 5)), by_column, matrix * by_column[None, :]),
    ):
        run = matrix.reshape(-1)[start : start + size].clone()
        assert lines.scale_(run, start, factors) is run
        assert torch.equal(run, expected.reshape(-1)[start : start + size])


def test_long_rows_are_summed_in_runs() -> None:
    values = randn(2, 100_000).double()
    assert torch.allclose(row_sums(values), values.sum(dim=1), rtol=1e-12, atol=1e-9)

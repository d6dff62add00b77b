"""Divergences of rows in compiled loops, against numbers of many digits."""

from __future__ import annotations

import math

import numpy as np
import pytest
from mpmath import mp, mpf

from mergekit_ray.methods.compiled import divergence

SMALLEST = 1e-8


def exact(x: np.ndarray, base: np.ndarray) -> float:
    """``Σ p ln(p/q) − (p − q)`` of one row, calculated with 60 digits."""
    with mp.workdps(60):
        p, q = ([mp.exp(mpf(float(value))) for value in row] for row in (x, base))
        p_sum, q_sum = mp.fsum(p), mp.fsum(q)
        pairs = [(a / p_sum + mpf(SMALLEST), b / q_sum + mpf(SMALLEST)) for a, b in zip(p, q, strict=True)]
        return float(mp.fsum(a * mp.log(a / b) - (a - b) for a, b in pairs))


def of_rows(x: np.ndarray, base: np.ndarray) -> list[float]:
    found = np.empty(len(x))
    divergence.of_rows(x.ravel(), base.ravel(), x.shape[1], SMALLEST, found)
    return list(found)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("length", [2, 63, 64, 65, 300])
@pytest.mark.parametrize(("scale", "change"), [(0.02, 0.002), (1.0, 0.1), (1.0, 3.0), (5.0, 0.5)])
def test_exact_to_many_digits(dtype: type[np.floating], length: int, scale: float, change: float) -> None:
    generator = np.random.default_rng(length)
    base = (scale * generator.normal(size=(4, length))).astype(dtype)
    x = (base + change * generator.normal(size=(4, length))).astype(dtype)
    assert of_rows(x, base) == pytest.approx([exact(*pair) for pair in zip(x, base, strict=True)], rel=1e-12)


def test_far_apart() -> None:
    """One has all its weight where the other has next to none: exponents of -2e38, which a float32 can hold."""
    x = np.array([[0.0, -2e38, 1.0]], np.float32)
    base = np.array([[-2e38, 0.0, -1e38]], np.float32)
    p = [value / (1 + math.e) + SMALLEST for value in (1.0, 0.0, math.e)]
    q = [SMALLEST, 1 + SMALLEST, SMALLEST]
    wanted = math.fsum(a * math.log(a / b) - (a - b) for a, b in zip(p, q, strict=True))
    assert of_rows(x, base) == pytest.approx([wanted], rel=1e-12)


def test_of_a_row_with_itself() -> None:
    x = np.random.default_rng(1).normal(size=(5, 77))
    assert of_rows(x, x) == [0.0] * 5
    assert max(of_rows(x + 1.0, x)) < 1e-28  # by rounding of the sum alone


def test_negative_zero_is_not_below_zero() -> None:
    assert of_rows(np.array([[-0.0, -0.0]]), np.array([[0.0, -0.0]])) == [0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_that_are_not_finite(bad: float, dtype: type[np.floating]) -> None:
    """Other rows are not touched by it."""
    x = np.random.default_rng(1).normal(size=(4, 70)).astype(dtype)
    base = np.random.default_rng(2).normal(size=(4, 70)).astype(dtype)
    wanted = of_rows(x, base)
    x[1, 69], base[3, 0] = bad, bad
    found = of_rows(x, base)
    assert [math.isnan(value) for value in found] == [False, True, False, True]
    assert found[::2] == wanted[::2]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("start", "size"), [(0, 35), (3, 1), (3, 2), (4, 17), (6, 14), (7, 7)])
def test_importance_of_runs_that_begin_anywhere(dtype: type[np.floating], start: int, size: int) -> None:
    x, base = np.random.default_rng(1).normal(size=(2, 35)).astype(dtype)
    factors = np.array([0.5, 2.0, 0.0, 1.0, 3.0], dtype)
    run, run_base = x[start : start + size], base[start : start + size]
    out = np.empty_like(run)
    divergence.importance(run, run_base, start, 7, factors, out)
    assert np.array_equal(out, np.abs(run - run_base) * factors.repeat(7)[start : start + size])
    limit = float(np.median(out))
    wanted = np.where(out >= limit, run, run_base)
    divergence.take_important(run, run_base, out, limit)
    assert np.array_equal(run, wanted)


@pytest.mark.parametrize(("x", "base"), [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, -math.inf)])
def test_what_is_not_finite_shows(x: float, base: float) -> None:
    """Its row's divergence is not a number."""
    run, run_base, weighed = np.array([x, 2.0]), np.array([base, 1.0]), np.empty(2)
    divergence.importance(run, run_base, 0, 2, np.array([math.nan]), weighed)
    divergence.take_important(run, run_base, weighed, 0.5)
    assert np.isnan(run).all()

"""Formulas that are written for numbers and for tensors of them: of whole tensors, and of each row on any device."""

from __future__ import annotations

import math

import pytest
import torch

from mergekit_ray.methods.model_stock import flat_ratio, interpolation_ratios
from mergekit_ray.methods.nuslerp import arc_factors, flat_factors
from mergekit_ray.methods.shared.gram import num_products


def inner_products(vectors: torch.Tensor) -> torch.Tensor:
    """Of each pair of ``[n, size]``, row by row of the upper triangle."""
    rows, columns = torch.triu_indices(len(vectors), len(vectors))
    return (vectors @ vectors.T)[rows, columns]


def cases(count: int) -> list[torch.Tensor]:
    """Vectors of all kinds: apart, nearly alike, alike, opposite, and zero."""
    generator = torch.Generator().manual_seed(count)
    drawn = torch.randn(count, 50, generator=generator, dtype=torch.float64)
    alike = drawn[:1].expand(count, -1)
    opposite = alike * torch.tensor([(-1.0) ** index for index in range(count)], dtype=torch.float64)[:, None]
    near = alike + 1e-3 * drawn
    partly = drawn.clone()
    partly[0] = 0.0
    return [drawn, near, alike, opposite, partly, torch.zeros_like(drawn)]


@pytest.mark.parametrize("t", [-0.5, 0.0, 0.3, 0.5, 1.0, 1.7])
def test_of_an_arc(t: float) -> None:
    for vectors in cases(2):
        inner = inner_products(vectors)
        expected = [float(factor) for factor in arc_factors(inner, t)]
        assert flat_factors(inner.tolist(), t) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert all(map(math.isnan, flat_factors([math.nan] * 3, t)))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_of_model_stock(count: int) -> None:
    for vectors in cases(count):
        inner = inner_products(vectors)
        assert len(inner) == num_products(count)
        expected = float(interpolation_ratios(inner, count))
        assert flat_ratio(inner.tolist(), count) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert math.isnan(flat_ratio([math.nan] * num_products(count), count))

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_ray.core.declaration import BaseUse
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.arcee_fusion import ArceeFusion, divergences
from mergekit_ray.methods.shared.rows import Lines
from support.method_conformance import Case, PropagatingConformance, as_float64
from support.operands import MemoryOperands, merge
from support.references import geometric as reference
from support.references.merge import Array


def expected(xs: list[Array], base: Array | None) -> reference.Expected:
    assert base is not None
    return reference.arcee_fusion(xs[0], base)


class TestArceeFusion(PropagatingConformance):
    CASES = (Case("arcee_fusion", expected),)


def fusion(x: torch.Tensor, base: torch.Tensor, **options: object) -> torch.Tensor:
    return merge("arcee_fusion", [x], base, **options)


def test_outliers_of_a_vector_are_kept() -> None:
    """In one row all share a divergence, so importance is the size of the change: quartiles 1, 2 and 4, limit 6.5."""
    changes = torch.tensor([0.0, 1.0, -1.0, 2.0, -2.0, 3.0, 4.0, -4.0, 6.25, -6.75, 7.0])
    ascending = changes.abs().sort().values
    assert [float(ascending[math.floor(part * 10)]) for part in (0.25, 0.5, 0.75)] == [1.0, 3.0, 4.0]
    base = torch.linspace(-1, 1, 11)
    kept = changes.abs() >= 3.0 + 1.5 * 3.0
    assert torch.equal(fusion(base + changes, base), torch.where(kept, base + changes, base))
    changes[9] = -7.5
    kept[9] = True  # equal to the limit, but for rounding of the sums
    assert torch.equal(fusion(changes, torch.zeros(11)), torch.where(kept, changes, 0.0))


def test_quartiles_are_elements_not_interpolated() -> None:
    """Of 1, 2, 3, 100: ranks 0, 1 and 2, so the limit is 2 + 1.5 · 2 = 5; interpolated it would be 47 or more."""
    changes = torch.tensor([1.0, 2.0, 3.0, 10.0])
    assert fusion(changes, torch.zeros(4)).tolist() == [0.0, 0.0, 0.0, 10.0]


def test_an_even_change_is_kept_whole() -> None:
    """All importance is equal, and so is the limit."""
    base = torch.zeros(4, 6)
    change = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0]).expand(4, 6)
    assert torch.equal(fusion(base + change, base), change)


def test_a_constant_change_is_kept_whole() -> None:
    """The softmax, and so the importance, is that of the base, though logarithms of sums are rounded otherwise."""
    base = torch.randint(-8, 8, (30, 40), generator=torch.Generator().manual_seed(1)) / 8
    x = base + torch.arange(30).view(30, 1) / 8
    assert torch.equal(fusion(x, base), x)


def test_few_changes_are_kept_whole() -> None:
    base = torch.randn(20, 10, generator=torch.Generator().manual_seed(1))
    x = base.clone()
    x[3, 4] += 0.5
    assert torch.equal(fusion(x, base), x)


def test_rows_of_one_element_have_no_divergence() -> None:
    base = torch.randn(20, 1, generator=torch.Generator().manual_seed(1))
    assert torch.equal(fusion(base + 0.5, base), base + 0.5)


def test_softmax_is_along_the_last_dimension() -> None:
    generator = torch.Generator().manual_seed(2)
    base, x = torch.randn(2, 3, 4, 5, generator=generator)
    assert torch.equal(fusion(x, base), fusion(x.reshape(12, 5), base.reshape(12, 5)).view(3, 4, 5))
    assert not torch.equal(fusion(x, base), fusion(x.reshape(3, 20), base.reshape(3, 20)).view(3, 4, 5))


def test_kept_elements_are_exact() -> None:
    generator = torch.Generator().manual_seed(3)
    base, x = torch.randn(2, 40, 50, generator=generator)
    x *= 1e-6  # x − b + b would be another number
    merged = fusion(x, base)
    assert bool(((merged == x) | (merged == base)).all())
    assert 0 < int((merged == x).sum()) < 1000


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
def test_divergences(scale: float) -> None:
    """Of rows that do not end with blocks; large values overflow nothing."""
    generator = torch.Generator().manual_seed(4)
    base = scale * torch.randn(7, 100_003, generator=generator)
    x = base + 0.1 * scale * torch.randn(7, 100_003, generator=generator)
    found = divergences(MemoryOperands([x], base), Lines.along_last((7, 100_003)))
    wanted = [reference.divergence(row, other) for row, other in zip(as_float64(x), as_float64(base), strict=True)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-8)


def test_divergences_of_nearly_equal_rows_are_not_rounding() -> None:
    """Of a change by 1e-6 that sums to 0 the divergence is half its variance: 5e-13."""
    base = torch.zeros(1, 1000, dtype=torch.float64)
    x = 1e-6 * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(500).view(1, -1)
    operands = MemoryOperands([x], base, compute_dtype=torch.float64)
    found = divergences(operands, Lines.along_last((1, 1000)))
    assert float(found) == pytest.approx(5e-13, rel=1e-4)  # the 1e-8 that is added is 1e-5 of each probability


def test_small_changes_stay_in_range() -> None:
    """A divergence of 1e-24 times 1e-12: below rounding in float64, and zero in float32, if taken as it is written."""
    changes = torch.tensor([1.0, 1.0, 2.0, 2.0, 3.0, 40.0])
    for scale in (1e-12, 1e-9, 1e-3):
        x, base = scale * changes, torch.zeros(6)
        assert torch.equal(fusion(x, base), torch.where(changes > 30, x, base))


def test_threshold_is_exact_for_large_tensors() -> None:
    """Beyond what is collected whole, with blocks that differ from each other."""
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(1200, 1000, generator=generator)
    x = base + torch.rand(1200, 1, generator=generator) * torch.randn(1200, 1000, generator=generator)
    operands = MemoryOperands([x], base)
    found = ArceeFusion().statistics(operands)
    assert found is not None
    importance = ((x - base).abs() * found.divergence[:, None]).reshape(-1).sort().values.double()
    first, median, third = (float(importance[math.floor(part * 1_199_999)]) for part in (0.25, 0.5, 0.75))
    limit = median + 1.5 * (third - first)
    assert limit <= found.threshold <= limit * (1 + 2**-23)


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), scale=st.sampled_from([1e-3, 1.0, 20.0]), seed=st.integers(0))
def test_formula_for_any_matrix(rows: int, columns: int, scale: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    base = scale * generator.normal(size=(rows, columns))
    x = base + 0.3 * scale * generator.normal(size=(rows, columns))
    merged = fusion(torch.from_numpy(x), torch.from_numpy(base), compute_dtype=torch.float64)
    reference.arcee_fusion(x, base).check(merged, roundings=0)


def test_declaration() -> None:
    declaration = METHODS.get("arcee_fusion")
    assert declaration.base is BaseUse.REQUIRED
    assert declaration.base_is_input
    assert (declaration.min_models, declaration.max_models) == (1, 1)
    assert declaration.parameter_names() == {}

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from mergekit_ray.core.declaration import Access, BaseUse
from mergekit_ray.core.registry import METHODS
from support.method_conformance import Case, MethodConformance, as_float64
from support.operands import merge
from support.references import geometric as reference
from support.references.merge import Array


def case(t: float) -> Case:
    def expected(xs: list[Array], base: Array | None) -> reference.Expected:
        assert base is not None
        return reference.nearswap(xs[0], base, t)

    return Case("nearswap", expected, {"t": t})


class TestNearswap(MethodConformance):
    CASES = (case(0.0), case(0.1), case(0.5), case(1e-7), case(100.0))


def nearswap(x: torch.Tensor, base: torch.Tensor, t: float) -> torch.Tensor:
    return merge("nearswap", [x], base, parameters={"t": t})


def test_near_elements_are_swapped_and_far_ones_moved_by_t() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
    x = torch.tensor([1.25, 0.75, 1.5, 3.0, -1.0])
    assert nearswap(x, base, 0.5).tolist() == [1.25, 0.75, 1.5, 1.5, 0.5]


def test_ends_are_exact() -> None:
    generator = torch.Generator().manual_seed(1)
    base, x = torch.randn(2, 1000, generator=generator)
    base[:300] *= 1e8
    assert torch.equal(nearswap(x, base, 0.0), base)
    assert torch.equal(nearswap(x, base, 1e10), x)


@pytest.mark.parametrize("t", [0.0, 1e-7, 1e-6, 0.5])
def test_nan_shows_whichever_tensor_it_is_in(t: float) -> None:
    good, bad = torch.tensor([1.0, 2.0]), torch.tensor([math.nan, 3.0])
    assert nearswap(bad, good, t).isnan().tolist() == [True, False]
    assert nearswap(good, bad, t).isnan().tolist() == [True, False]
    # An infinity does not: the result is at most t from the base. So inputs are checked by themselves.
    assert not METHODS.get("nearswap").propagates_non_finite


def test_differences_below_a_millionth_count_as_one() -> None:
    base = torch.zeros(4, dtype=torch.float64)
    x = torch.tensor([1e-9, 1e-7, 1e-6, 2e-6], dtype=torch.float64)
    merged = merge("nearswap", [x], base, parameters={"t": 1e-8}, compute_dtype=torch.float64)
    assert merged.tolist() == pytest.approx([1e-11, 1e-9, 1e-8, 1e-8], rel=1e-12)
    assert nearswap(base, base, 1e-8).tolist() == [0.0] * 4


@settings(max_examples=200, deadline=None)
@given(
    rows=hnp.arrays(np.float32, (2, 20), elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=True)),
    t=st.floats(0.0, 1e3),
)
def test_formula_and_bounds_for_any_finite_values(rows: Array, t: float) -> None:
    base, x = torch.from_numpy(rows.copy())
    merged = nearswap(x, base, t)
    reference.nearswap(as_float64(x), as_float64(base), t).check(merged, roundings=8)
    assert ((merged >= torch.minimum(x, base)) & (merged <= torch.maximum(x, base)) | (abs(x - base) < 1)).all()


def test_declaration() -> None:
    declaration = METHODS.get("nearswap")
    assert declaration.base is BaseUse.REQUIRED
    assert declaration.base_is_input
    assert declaration.access is Access.ELEMENTWISE
    assert (declaration.min_models, declaration.max_models) == (1, 1)
    assert declaration.parameter_names() == {"t": "global"}
    for wrong in ({}, {"t": -0.1}, {"t": math.inf}):
        with pytest.raises(ValidationError, match="t\n"):
            declaration.global_parameters.model_validate(wrong)


def test_in_bfloat16_every_step_is_rounded() -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(4000, generator=generator).bfloat16()
    x = (base.float() + 0.01 * torch.randn(4000, generator=generator)).bfloat16()
    share = (0.007 / (base - x).abs().clamp(min=1e-6)).clamp(0.0, 1.0)
    expected = share * x + (1 - share) * base
    merged = merge("nearswap", [x.clone()], base.clone(), parameters={"t": 0.007}, compute_dtype=torch.bfloat16)
    assert torch.equal(merged, expected)

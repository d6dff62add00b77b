from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_ray.core.declaration import BaseUse
from mergekit_ray.core.registry import METHODS
from support.method_conformance import Case, PropagatingConformance, as_float64
from support.operands import merge
from support.references import geometric as reference


def case(weights: tuple[float, float], axis: int | None, *, has_base: bool) -> Case:
    parameters = {
        None: {},
        -1: {"nuslerp_flatten": False},
        0: {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    }[axis]
    return Case(
        "nuslerp",
        lambda xs, base: reference.nuslerp(xs, base, weights, axis),
        parameters,
        weights=weights,
        has_base=has_base,
    )


class TestNuslerp(PropagatingConformance):
    CASES = (
        case((0.3, 0.5), None, has_base=False),
        case((0.3, 0.5), None, has_base=True),
        case((1.0, 1.0), -1, has_base=False),
        case((0.2, 0.8), -1, has_base=True),
        case((0.2, 0.8), 0, has_base=False),
        case((3.0, -1.0), 0, has_base=True),
    )


def nuslerp(
    xs: tuple[torch.Tensor, torch.Tensor],
    weights: tuple[float, float] = (1.0, 1.0),
    base: torch.Tensor | None = None,
    **parameters: bool,
) -> torch.Tensor:
    per_model = [{"weight": weight} for weight in weights]
    return merge("nuslerp", xs, base, parameters=parameters, input_parameters=per_model)


def test_vectors_of_a_matrix() -> None:
    """Orthogonal rows and colinear columns, or the other way round."""
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    y = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    half = math.sqrt(0.5)
    by_row = torch.tensor([[half, half], [2 * half, 2 * half]])
    assert torch.allclose(nuslerp((x, y), nuslerp_flatten=False), by_row, rtol=1e-6, atol=0)
    # The columns of x are (1, 2) and 0, those of y 0 and (1, 2): zero vectors are orthogonal to all.
    by_column = nuslerp((x, y), nuslerp_flatten=False, nuslerp_row_wise=True)
    assert torch.allclose(by_column, by_row, rtol=1e-6, atol=0)
    z = torch.tensor([[3.0, 0.0], [4.0, 0.0]])
    assert torch.equal(nuslerp((x, z), nuslerp_flatten=False), (x + z) / 2)  # all rows are colinear
    curved = nuslerp((x, z), nuslerp_flatten=False, nuslerp_row_wise=True)
    assert float(curved[:, 0].norm()) > float(((x + z) / 2)[:, 0].norm())


def test_row_wise_has_no_effect_on_flat_tensors_and_vectors() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(6, 7, generator=generator), torch.randn(6, 7, generator=generator)
    assert torch.equal(nuslerp((x, y), nuslerp_row_wise=True), nuslerp((x, y)))
    flat = nuslerp((x.view(-1), y.view(-1)))
    assert torch.equal(nuslerp((x.view(-1), y.view(-1)), nuslerp_flatten=False), flat)
    assert torch.equal(nuslerp((x.view(-1), y.view(-1)), nuslerp_flatten=False, nuslerp_row_wise=True), flat)


def test_stays_on_the_circle() -> None:
    for angle in (0.1, 1.0, math.pi / 2, 3.0):
        for t in (0.0, 0.25, 0.5, 1.0):
            x = torch.tensor([1.0, 0.0], dtype=torch.float64)
            y = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
            per_model = [{"weight": 1 - t}, {"weight": t}]
            merged = merge("nuslerp", [x, y], input_parameters=per_model, compute_dtype=torch.float64)
            expected = torch.tensor([math.cos(t * angle), math.sin(t * angle)], dtype=torch.float64)
            assert torch.allclose(merged, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 2.0)])
@pytest.mark.parametrize("flatten", [False, True])
def test_ends_are_exact(weights: tuple[float, float], flatten: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 25, generator=generator), torch.randn(40, 25, generator=generator)
    end = x if weights[0] else y
    assert torch.equal(nuslerp((x, y), weights, nuslerp_flatten=flatten), end)
    near = x * 1.25
    assert torch.equal(nuslerp((x, near), weights, nuslerp_flatten=flatten), x if weights[0] else near)


def test_opposite_vectors_are_interpolated_linearly() -> None:
    x = torch.tensor([1.0, 2.0, -4.0])
    assert torch.equal(nuslerp((x, -x), (3.0, 1.0)), 0.5 * x)
    assert torch.equal(nuslerp((x, -x)), torch.zeros(3))


@pytest.mark.parametrize("weights", [(0.0, 0.0), (1.0, -1.0), (2e-7, 6e-7)])
def test_weights_that_cancel_are_equal(weights: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(30, generator=generator), torch.randn(30, generator=generator)
    assert torch.equal(nuslerp((x, y), weights), nuslerp((x, y), (1.0, 1.0)))


def test_small_weights_that_do_not_cancel_count() -> None:
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert torch.allclose(nuslerp((x, y), (3e-6, 1e-6)), nuslerp((x, y), (3.0, 1.0)), rtol=1e-6, atol=0)


def test_short_vectors_count_as_orthogonal() -> None:
    x, y = torch.tensor([1e-12, 0.0]), torch.tensor([0.5e-12, 0.8e-12])
    assert torch.allclose(nuslerp((x, y)), math.sqrt(0.5) * (x + y), rtol=1e-6, atol=0)


def test_huge_vectors_keep_their_angle() -> None:
    x, y = torch.tensor([1e30, 0.0]), torch.tensor([0.0, 1e30])
    half = math.sqrt(0.5) * 1e30
    assert torch.allclose(nuslerp((x, y)), torch.tensor([half, half]), rtol=1e-6, atol=0)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    weight=st.floats(0.01, 0.99),
    axis=st.sampled_from([None, -1, 0]),
    seed=st.integers(0, 1000),
    has_base=st.booleans(),
)
def test_formula_for_any_matrix(
    rows: int, columns: int, weight: float, axis: int | None, seed: int, has_base: bool
) -> None:
    drawn = case((1 - weight, weight), axis, has_base=has_base)
    xs, base = drawn.tensors((rows, columns), torch.float32, seed)
    expected = drawn.expected(xs, base)
    # 1-element vectors are colinear, whatever their signs; elsewhere nearly opposite ones magnify rounding.
    vectors = reference.differences([as_float64(x) for x in xs], None if base is None else as_float64(base))
    largest = max(float(abs(vector).max()) for vector in vectors)
    expected.magnitude += abs(expected.value).max() + largest
    expected.check(drawn.merge(xs, base), roundings=40)


def test_declaration() -> None:
    declaration = METHODS.get("nuslerp")
    assert declaration.base is BaseUse.OPTIONAL
    assert not declaration.base_is_input
    assert (declaration.min_models, declaration.max_models) == (2, 2)
    assert declaration.parameter_names() == {
        "weight": "model",
        "nuslerp_flatten": "global",
        "nuslerp_row_wise": "global",
    }
    assert declaration.global_parameters().model_dump() == {"nuslerp_flatten": True, "nuslerp_row_wise": False}

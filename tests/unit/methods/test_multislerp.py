from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mergekit_ray.core.declaration import BaseUse
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.registry import METHODS
from support.method_conformance import Case, PropagatingConformance
from support.operands import merge
from support.references import geometric as reference


def case(*weights: float, has_base: bool = False, **parameters: float) -> Case:
    normalize, eps = bool(parameters.get("normalize_weights", True)), parameters.get("eps", 1e-8)
    return Case(
        "multislerp",
        lambda xs, base: reference.multislerp(xs, base, weights, normalize=normalize, eps=eps),
        parameters,
        weights=weights,
        has_base=has_base,
    )


class TestMultislerp(PropagatingConformance):
    CASES = (
        case(0.3, 0.5, 0.9),
        case(0.3, 0.5, 0.9, has_base=True),
        case(1.0, 2.5, has_base=True, normalize_weights=False),
        case(2.0, -0.5, 1.0, 0.0, normalize_weights=False),
        case(0.3, 0.5, eps=0.1),
        case(0.4),
        case(0.4, has_base=True, normalize_weights=False),
    )


def multislerp(
    xs: list[torch.Tensor], weights: list[float], base: torch.Tensor | None = None, **parameters: float
) -> torch.Tensor:
    per_model = [{"weight": weight} for weight in weights]
    return merge("multislerp", xs, base, parameters=parameters, input_parameters=per_model)


def test_mean_direction_and_mean_norm() -> None:
    """Vectors of length 1 and 3, a right angle apart: length 2 on the bisector."""
    merged = multislerp([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])], [1.0, 1.0])
    assert torch.allclose(merged, torch.tensor([math.sqrt(2), math.sqrt(2)]), rtol=1e-6, atol=0)


def test_two_models_meet_slerp_half_way() -> None:
    """On the unit sphere the normalised mean of two vectors is the middle of their arc."""
    generator = torch.Generator().manual_seed(1)
    x, y = (v / v.norm() for v in torch.randn(2, 50, generator=generator, dtype=torch.float64).float())
    middle = merge("slerp", [y], x, parameters={"t": 0.5})
    assert torch.allclose(multislerp([x, y], [1.0, 1.0]), middle, rtol=0, atol=1e-6)


def test_identical_models() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(multislerp([x] * 3, [0.2, 0.3, 0.9]), x, rtol=3e-7, atol=0)


def test_one_model_is_itself_whatever_its_weight() -> None:
    x, base = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.5, 1.0, 8.0])
    for weight in (0.0, 0.3, -2.0):
        assert torch.equal(multislerp([x], [weight]), x)
        assert torch.equal(multislerp([x], [weight], base), x)


def test_two_opposite_models_are_interpolated_linearly() -> None:
    x = torch.tensor([2.0, 0.0, -4.0])
    assert torch.equal(multislerp([x, -0.5 * x], [1.0, 1.0]), 0.25 * x)
    assert torch.equal(multislerp([x, -0.5 * x], [2.0, 2.0], normalize_weights=False), x)
    # Weights that balance out without being normalised.
    assert torch.equal(multislerp([x, x], [1.0, -1.0], normalize_weights=False), torch.zeros(3))


@pytest.mark.parametrize(
    "rows",
    [
        [[1.0, 0.0], [-0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)]],
        [[2.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -3.0]],
    ],
)
def test_directions_of_three_or_more_that_cancel_are_an_error(rows: list[list[float]]) -> None:
    weights = [1.0] * len(rows)
    with pytest.raises(MergeError, match="cancel") as caught:
        multislerp([torch.tensor(row) for row in rows], weights)
    assert str([1 / len(rows)] * len(rows)) in str(caught.value)
    assert "weight" in str(caught.value.remedy)
    # A little more weight on one of them, and there is a direction.
    merged = multislerp([torch.tensor(row) for row in rows], [1.1, *weights[1:]])
    assert merged[0] > 0
    assert abs(float(merged[1])) < 1e-6


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [0.1, 0.2, -0.3]])
def test_weights_that_cancel_cannot_be_normalised(weights: list[float]) -> None:
    with pytest.raises(MergeError, match="sum to 0") as caught:
        multislerp([torch.ones(3)] * len(weights), weights)
    assert "normalize_weights: false" in str(caught.value)


def test_zero_tensors_have_no_direction_but_count_in_the_norm() -> None:
    x, zeros = torch.tensor([0.0, 3.0, 4.0]), torch.zeros(3)
    assert torch.allclose(multislerp([x, zeros], [1.0, 3.0]), 0.25 * x, rtol=1e-6, atol=0)
    assert torch.equal(multislerp([zeros] * 3, [1.0] * 3), zeros)
    assert torch.equal(multislerp([x, x, zeros], [0.0, 0.0, 1.0]), zeros)
    assert torch.equal(multislerp([x] * 3, [1.0] * 3, x), x)
    assert torch.equal(multislerp([x, zeros], [1.0, 1.0], eps=0.0), 0.5 * x)


@settings(max_examples=100, deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=5),
    shape=st.sampled_from([(), (3,), (17,), (4, 5)]),
    seed=st.integers(0, 1000),
    has_base=st.booleans(),
    normalize=st.booleans(),
)
def test_formula_for_any_weights(
    weights: list[float], shape: tuple[int, ...], seed: int, has_base: bool, normalize: bool
) -> None:
    drawn = case(*weights, has_base=has_base, normalize_weights=normalize)
    xs, base = drawn.tensors(shape, torch.float32, seed)
    try:
        merged = drawn.merge(xs, base)
    except MergeError:
        assume(False)
    expected = drawn.expected(xs, base)
    expected.check(merged, roundings=20)


def test_declaration() -> None:
    declaration = METHODS.get("multislerp")
    assert declaration.base is BaseUse.OPTIONAL
    assert (declaration.min_models, declaration.max_models) == (1, None)
    assert declaration.parameter_names() == {"weight": "model", "normalize_weights": "global", "eps": "global"}
    assert declaration.global_parameters().model_dump() == {"normalize_weights": True, "eps": 1e-8}
    with pytest.raises(ValidationError, match="eps"):
        declaration.global_parameters(eps=-1e-8)

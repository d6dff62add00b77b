from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mergekit_ray.core.declaration import BaseUse
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.karcher import mean_direction
from support.method_conformance import Case, PropagatingConformance, as_float64
from support.operands import merge
from support.references import geometric as reference


def case(num_models: int, **parameters: float) -> Case:
    return Case(
        "karcher",
        lambda xs, _: reference.karcher(xs, **parameters),
        parameters,
        num_models=num_models,
        has_base=False,
    )


class TestKarcher(PropagatingConformance):
    CASES = (case(1), case(2), case(3), case(5, max_iter=3, tol=1e-9), case(3, max_iter=0), case(4, tol=0.01))


def karcher(*xs: torch.Tensor, **parameters: float) -> torch.Tensor:
    return merge("karcher", xs, parameters=parameters)


def test_two_models_meet_slerp_half_way() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (v / v.norm() for v in torch.randn(2, 50, generator=generator))
    assert torch.allclose(karcher(x, y), merge("slerp", [y], x, parameters={"t": 0.5}), rtol=0, atol=1e-6)


def test_mean_of_a_great_circle() -> None:
    """On one arc the mean is at the mean angle, which the normalised mean of the vectors is not."""
    angles = (0.0, 0.1, 1.4)
    vectors = [torch.tensor([math.cos(a), math.sin(a)], dtype=torch.float64) for a in angles]
    merged = merge("karcher", vectors, parameters={"tol": 1e-12, "max_iter": 50}, compute_dtype=torch.float64)
    assert merged.tolist() == pytest.approx([math.cos(0.5), math.sin(0.5)], abs=1e-7)
    chordal = merge("karcher", vectors, parameters={"max_iter": 0}, compute_dtype=torch.float64)
    assert abs(math.atan2(chordal[1], chordal[0]) - 0.5) > 0.01


def test_tangents_at_the_mean_balance() -> None:
    """The definition, for models far apart: the logarithms at the mean sum to zero."""
    generator = torch.Generator().manual_seed(3)
    xs = [torch.randn(20, generator=generator, dtype=torch.float64).abs() for _ in range(4)]
    merged = as_float64(merge("karcher", xs, parameters={"tol": 1e-12, "max_iter": 100}, compute_dtype=torch.float64))
    pole = merged / np.linalg.norm(merged)
    total = np.zeros(20)
    for x in xs:
        unit = as_float64(x / x.norm())
        across = unit - (unit @ pole) * pole
        total += across / np.linalg.norm(across) * math.acos(unit @ pole)
    assert np.linalg.norm(total) < 1e-7
    assert np.linalg.norm(merged) == pytest.approx(np.mean([float(x.norm()) for x in xs]), rel=1e-12)


def test_a_step_shorter_than_the_tolerance_ends_the_iteration() -> None:
    generator = torch.Generator().manual_seed(4)
    xs = [torch.randn(30, generator=generator) for _ in range(3)]
    exact = karcher(*xs, tol=1e-12, max_iter=100)
    distances = [float((karcher(*xs, tol=tol, max_iter=100) - exact).norm()) for tol in (1.0, 1e-2, 1e-4)]
    assert distances[0] > distances[1] > distances[2] > 0
    by_steps = [float((karcher(*xs, tol=0.0, max_iter=steps) - exact).norm()) for steps in (0, 1, 2)]
    assert by_steps[0] == distances[0]
    assert by_steps[0] > by_steps[1] > by_steps[2] > 0


def test_identical_models() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(karcher(x, x, x), x, rtol=3e-7, atol=0)
    assert torch.equal(karcher(x), x)


def test_nearly_identical_models_give_their_mean() -> None:
    """Angles of 1e-9, which inner products cannot tell from 0."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1000, generator=generator, dtype=torch.float64)
    xs = [x + 1e-9 * torch.randn(1000, generator=generator, dtype=torch.float64) for _ in range(3)]
    merged = merge("karcher", xs, parameters={"tol": 0.0, "max_iter": 30}, compute_dtype=torch.float64)
    assert torch.allclose(merged, sum(xs) / 3, rtol=0, atol=1e-8)


def test_opposite_models_have_the_first_ones_direction() -> None:
    x, y = torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 0.0])
    assert torch.equal(karcher(x, y), torch.tensor([1.5, 0.0]))
    assert torch.equal(karcher(y, x), torch.tensor([-1.5, 0.0]))
    # Two against one: with the two. The opposite one pulls nowhere.
    assert torch.allclose(karcher(y, x, x), torch.tensor([5 / 3, 0.0]), rtol=1e-6, atol=0)


def test_directions_that_balance_out_start_from_the_first() -> None:
    rows = [[1.0, 0.0], [-0.5, math.sqrt(0.75)], [-0.5, -math.sqrt(0.75)]]
    merged = merge("karcher", [torch.tensor(row, dtype=torch.float64) for row in rows], compute_dtype=torch.float64)
    assert merged.tolist() == pytest.approx([1.0, 0.0], abs=1e-7)


def test_zero_tensors_have_no_direction_but_count_in_the_norm() -> None:
    x, y, zeros = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0]), torch.zeros(2)
    assert torch.allclose(karcher(x, zeros), 0.5 * x, rtol=1e-6, atol=0)
    assert torch.allclose(karcher(x, zeros, y), karcher(x, y) * 2 / 3, rtol=1e-6, atol=0)
    assert torch.equal(karcher(zeros, zeros), zeros)


def test_vectors_shorter_than_the_tolerance_have_no_direction() -> None:
    x, short = torch.tensor([0.0, 1.0]), torch.tensor([0.9e-5, 0.0])
    assert karcher(x, short)[0] == 0.0
    assert karcher(x, short / 0.8)[0] > 0.1
    assert karcher(x, short, tol=0.0)[0] > 0.1


@settings(max_examples=100, deadline=None)
@given(
    num_models=st.integers(1, 5),
    size=st.integers(1, 20),
    steps=st.integers(0, 12),
    spread=st.sampled_from([1e-3, 0.1, 1.0]),
    seed=st.integers(0, 1000),
)
def test_coefficients_are_those_of_the_vectors(
    num_models: int, size: int, steps: int, spread: float, seed: int
) -> None:
    """The iteration on coefficients against that on vectors."""
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=size) + 3.0
    xs = [shared + spread * generator.normal(size=size) for _ in range(num_models)]
    coefficients = mean_direction([[float(x @ y) for y in xs] for x in xs], steps, 1e-6)
    merged = sum(c * x for c, x in zip(coefficients, xs, strict=True))
    expected = reference.karcher(xs, steps, 1e-6).value
    assert np.abs(merged - expected).max() < 1e-6 * np.abs(expected).max() + 1e-12


def test_declaration() -> None:
    declaration = METHODS.get("karcher")
    assert declaration.base is BaseUse.FORBIDDEN
    assert (declaration.min_models, declaration.max_models) == (1, None)
    assert declaration.parameter_names() == {"max_iter": "global", "tol": "global"}
    assert declaration.global_parameters().model_dump() == {"max_iter": 10, "tol": 1e-5}
    for wrong in ({"max_iter": -1}, {"max_iter": 2.5}, {"tol": -1e-5}, {"tol": math.nan}):
        with pytest.raises(ValidationError):
            declaration.global_parameters.model_validate(wrong)

"""The geometric median against Weiszfeld's iteration on the vectors, and against what it minimises."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from mergekit_ray.core.declaration import Access, BaseUse
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.geometric_median import coefficients_of_median
from support.operands import merge
from support.references import paper as reference
from support.references.merge import Array, Expected
from support.references.paper import as_float64, evaluated, random_models

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAME = "geometric_median"
EXACT = {"max_iterations": 20_000, "tolerance": 0.0}


def median(xs: Sequence[torch.Tensor], weights: Sequence[float] | None = None, **parameters: float) -> torch.Tensor:
    models = None if weights is None else [{"weight": weight} for weight in weights]
    return merge(NAME, xs, parameters=parameters, input_parameters=models)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.8, 1.2, 0.9, 1.0), (1.0, 0.9, 0.0, 0.8)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formula(weights: tuple[float, ...], dtype: torch.dtype) -> None:
    for shape in [(7,), (64, 33), (3, 5, 7)]:
        xs, _ = random_models(shape, len(weights), dtype)
        result = median(xs, weights, **EXACT)
        assert result.dtype == dtype
        assert result.shape == shape
        used = [(as_float64(x), w) for x, w in zip(xs, weights, strict=True) if w]
        value = reference.geometric_median([x for x, _ in used], [w for _, w in used])
        magnitude = np.asarray(sum(np.abs(x) for x, _ in used))
        Expected(value, magnitude, np.ones_like(value, dtype=bool)).check(result, roundings=4)


def test_beyond_one_block_and_for_any_chunk_size() -> None:
    xs, _ = random_models((401, 700), 3, torch.bfloat16)
    xs[2] = xs[2] * 3
    whole = merge(NAME, xs, out_dtype=torch.float32)
    value = reference.geometric_median([as_float64(x) for x in xs], [1.0] * 3, iterations=60)
    magnitude = np.asarray(sum(np.abs(as_float64(x)) for x in xs))
    Expected(value, magnitude, np.ones_like(value, dtype=bool)).check(whole, roundings=8)
    for chunk_elements in (1 << 16, 9973):
        assert torch.equal(merge(NAME, xs, out_dtype=torch.float32, chunk_elements=chunk_elements), whole)
    for num_threads in (1, 2):
        assert torch.equal(evaluated(NAME, xs, None, out_dtype=torch.float32, num_threads=num_threads), whole)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_any_chunk_size_in_any_compute_dtype(dtype: torch.dtype) -> None:
    xs, _ = random_models((2011,), 4, dtype)
    whole = merge(NAME, xs, compute_dtype=dtype)
    for chunk_elements in (1, 7, 1000):
        assert torch.equal(merge(NAME, xs, compute_dtype=dtype, chunk_elements=chunk_elements), whole)


def test_number_of_torch_threads() -> None:
    xs, _ = random_models((300_001,), 4)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)  # one_thread of conftest.py sets it back
        results.append(merge(NAME, xs))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_models_much_closer_to_each_other_than_to_zero() -> None:
    """As fine-tuned models are: the inner products of the models themselves would have lost the distances."""
    base = torch.full((1000,), 1000.0)
    deltas = [torch.randn(1000, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    xs = [base + 2.0**-10 * (delta * 64).round() for delta in deltas]
    result = merge(NAME, xs, parameters=EXACT, out_dtype=torch.float64, compute_dtype=torch.float64)
    value = reference.geometric_median([as_float64(x) for x in xs], [1.0] * 3)
    assert np.abs(as_float64(result) - value).max() < 1e-10


def test_an_outlier_moves_it_boundedly() -> None:
    xs, _ = random_models((200,), 4)
    direction = torch.ones(200)
    near, far = (median([*xs, xs[0] + size * direction]) for size in (1e2, 1e8))
    assert torch.allclose(near, far, atol=0.1)
    plain = torch.stack(xs).mean(dim=0)
    assert (far - plain).norm() < (xs[0] - plain).norm()


def test_corner_of_a_triangle() -> None:
    """A right angle, its median by its closed form; a corner of more than 120° is the median itself."""
    right = [torch.tensor(p) for p in ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0])]
    place = (3 - math.sqrt(3)) / 6
    assert torch.allclose(median(right), torch.tensor([place, place]), atol=1e-6)
    wide = [torch.tensor(p) for p in ([0.1, 0.2], [5.3, 0.7], [-5.1, 0.3])]
    assert torch.equal(median(wide), wide[0])


def test_crossing_of_a_convex_quadrilateral() -> None:
    corners = [torch.tensor(p) for p in ([0.0, 0.0], [4.0, 4.0], [4.0, 0.0], [0.0, 2.0])]
    assert torch.allclose(median(corners, **EXACT), torch.tensor([4 / 3, 4 / 3]), atol=1e-6)


def test_one_and_two_models() -> None:
    xs, _ = random_models((100,), 2)
    assert torch.equal(median(xs[:1]), xs[0])
    assert torch.allclose(median(xs), (xs[0] + xs[1]) / 2, rtol=1e-6)
    assert torch.equal(median(xs, [1.0, 1.001]), xs[1])
    assert torch.equal(median(xs, [5.0, 0.0]), xs[0])


def test_a_model_that_outweighs_the_others_is_the_median() -> None:
    xs, _ = random_models((100,), 4)
    assert torch.equal(median(xs, [0.3, 1.0, 0.3, 0.3]), xs[1])
    assert torch.equal(median([xs[0], xs[1], xs[1], xs[2]]), xs[1])


def test_the_mean_may_lie_on_a_model_that_is_not_the_median() -> None:
    """There Weiszfeld's own step is a division by zero."""
    xs = [torch.tensor(p) for p in ([0.0, 0.0], [3.0, 0.0], [-1.5, 2.0], [-1.5, -2.0])]
    weights = [0.1, 1.0, 1.0, 1.0]
    value = reference.geometric_median([as_float64(x) + 1e-14 for x in xs], weights)
    assert np.allclose(as_float64(median(xs, weights, **EXACT)), value, atol=1e-6)


def test_on_a_line() -> None:
    points = [torch.tensor([float(p), 2.0 * p, -p]) for p in (0, 10, 11, 30, 100)]
    assert torch.equal(median(points), points[2])
    between = median(points[:4])[0]
    assert 10 - 1e-3 <= between <= 11 + 1e-3


def test_equal_models_come_out_bit_for_bit() -> None:
    xs, _ = random_models((1000,), 1)
    assert torch.equal(median(xs * 3), xs[0])
    assert torch.equal(median(xs * 3, [0.1, 0.2, 0.7]), xs[0])
    assert torch.equal(median([torch.zeros(5)] * 2), torch.zeros(5))


def test_opposite_models() -> None:
    xs, _ = random_models((100,), 1)
    assert torch.equal(median([xs[0], -xs[0]]), torch.zeros(100))
    assert torch.equal(median([xs[0], -xs[0], torch.zeros(100)]), torch.zeros(100))


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 5)], ids=str)
def test_few_elements(shape: tuple[int, ...]) -> None:
    xs = [torch.full(shape, value) for value in (1.0, 5.0, 2.0)]
    assert torch.equal(median(xs), xs[2])
    assert evaluated(NAME, xs, None).shape == shape


def test_order_of_models_does_not_matter() -> None:
    xs, _ = random_models((100,), 4)
    assert torch.allclose(median(xs), median(xs[::-1]), atol=1e-6)


def test_no_iteration_is_the_mean() -> None:
    xs, _ = random_models((100,), 3)
    assert torch.allclose(median(xs, max_iterations=0), torch.stack(xs).mean(dim=0), atol=1e-6)
    weighted = median(xs, [1.0, 0.5, 0.75], max_iterations=0)
    assert torch.allclose(weighted, (xs[0] + 0.5 * xs[1] + 0.75 * xs[2]) / 2.25, atol=1e-6)


def test_weights_of_zero() -> None:
    xs, _ = random_models((10,), 2)
    with pytest.raises(MergeError, match="all weights are 0") as caught:
        median(xs, [0.0, 0.0])
    assert "weight above 0" in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.0, 1.0, 1.0), (1.0, 9.0, 1.0)], ids=str)
def test_non_finite_inputs_show(weights: tuple[float, ...], bad: float) -> None:
    for place in range(3):
        xs, _ = random_models((10,), 3)
        xs[place][4] = bad
        result = median(xs, weights)
        assert (~result.isfinite()).nonzero().view(-1).tolist() == [4]
        with pytest.raises(MergeError, match="flat index 4"):
            evaluated(NAME, xs, None, None, [{"weight": weight} for weight in weights])
    both = [torch.tensor([math.inf, 1.0]), torch.tensor([1.0, -math.inf]), torch.tensor([0.0, 0.0])]
    assert not median(both).isfinite().any()


@settings(max_examples=100, deadline=None)
@given(
    points=hnp.arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=st.integers(-4, 4)),
    seed=st.integers(0, 1000),
)
def test_no_point_nearby_is_better(points: Array, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 5, len(points)) / 4
    found = coefficients_of_median(
        ((points[:, None] - points[None]) ** 2).sum(axis=2).tolist(), weights.tolist(), max_iterations=5000, tolerance=0
    )
    assert min(found) >= -1e-12
    assert sum(found) == pytest.approx(1)
    y = np.array(found) @ points
    least = reference.distance_sum(y, list(points), weights)
    for size in (1e-3, 0.1, 1.0):
        for _ in range(10):
            other = y + size * rng.standard_normal(points.shape[1])
            assert reference.distance_sum(other, list(points), weights) > least - 1e-5
    assert all(reference.distance_sum(point, list(points), weights) > least - 1e-5 for point in points)


def test_declaration() -> None:
    declaration = METHODS.get(NAME)
    assert declaration.name == NAME
    assert declaration.summary.endswith(".")
    assert declaration.base is BaseUse.FORBIDDEN
    assert declaration.access is Access.REDUCE
    assert declaration.propagates_non_finite
    assert declaration.parameter_names() == {"weight": "model", "max_iterations": "global", "tolerance": "global"}
    assert all(field.description for field in declaration.global_parameters.model_fields.values())
    for wrong in ({"weight": -1.0}, {"weight": float("inf")}):
        with pytest.raises(ValidationError):
            declaration.model_parameters.model_validate(wrong)

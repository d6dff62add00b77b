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
from support.references.merge import Array


def case(num_models: int, *, filter_wise: bool) -> Case:
    def expected(xs: list[Array], base: Array | None) -> reference.Expected:
        assert base is not None
        return reference.model_stock(xs, base, filter_wise=filter_wise)

    return Case("model_stock", expected, {"filter_wise": filter_wise} if filter_wise else {}, num_models=num_models)


class TestModelStock(PropagatingConformance):
    CASES = tuple(case(count, filter_wise=filter_wise) for count in (2, 3, 5) for filter_wise in (False, True))


def model_stock(xs: list[torch.Tensor], base: torch.Tensor, *, filter_wise: bool = False) -> torch.Tensor:
    return merge("model_stock", xs, base, parameters={"filter_wise": filter_wise})


@pytest.mark.parametrize("num_models", [2, 3, 4])
@pytest.mark.parametrize("angle", [0.0, 0.5, 1.0, math.pi / 2])
def test_ratio_of_equal_angles(num_models: int, angle: float) -> None:
    """Task vectors pairwise at one angle: t = N cos θ / (1 + (N − 1) cos θ)."""
    cosine = math.cos(angle)
    # Rows with the wanted Gram matrix, by its Cholesky factor (of a hair more, where it is singular).
    gram = torch.full((num_models, num_models), cosine, dtype=torch.float64)
    gram.fill_diagonal_(1.0 + 1e-13)
    deltas = torch.linalg.cholesky(gram).float()
    base = torch.arange(num_models, dtype=torch.float32)
    xs = [base + delta for delta in deltas]
    t = num_models * cosine / (1 + (num_models - 1) * cosine)
    expected = t * sum(xs) / num_models + (1 - t) * base
    assert torch.allclose(model_stock(xs, base), expected, rtol=0, atol=1e-6)


def test_rows_have_ratios_of_their_own() -> None:
    base = torch.zeros(3, 2)
    x = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    y = torch.tensor([[0.0, 1.0], [1.0, 1.0], [5.0, 1.0]])
    merged = model_stock([x, y], base, filter_wise=True)
    # Orthogonal: the base. Equal: the models. One without change: the base.
    assert torch.allclose(merged, torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]), rtol=0, atol=1e-6)
    assert float(model_stock([x, y], base)[0, 0]) > 0.1


def test_filters_of_a_3d_tensor_are_vectors_along_its_last_dimension() -> None:
    generator = torch.Generator().manual_seed(1)
    base, *xs = torch.randn(4, 3, 4, 5, generator=generator)
    merged = model_stock(xs, base, filter_wise=True)
    for i in range(3):
        for j in range(4):
            alone = model_stock([x[i, j] for x in xs], base[i, j])
            assert torch.allclose(merged[i, j], alone, rtol=1e-6, atol=1e-6)


def test_a_vector_is_one_filter() -> None:
    generator = torch.Generator().manual_seed(1)
    base, *xs = torch.randn(4, 50, generator=generator)
    assert torch.equal(model_stock(xs, base, filter_wise=True), model_stock(xs, base))


@pytest.mark.parametrize("filter_wise", [False, True])
def test_identical_models_are_the_result(filter_wise: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    base, x = torch.randn(2, 8, 20, generator=generator)
    merged = model_stock([x, x, x], base, filter_wise=filter_wise)
    assert torch.allclose(merged, x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize(
    "rows",
    [
        [[[2.0, 0.0]], [[-1.0, 0.0]]],
        [[[1.0, 0.0]], [[-0.5, math.sqrt(0.75)]], [[-0.5, -math.sqrt(0.75)]]],
    ],
)
def test_changes_that_balance_out_leave_the_base(rows: list[list[list[float]]], filter_wise: bool) -> None:
    base = torch.tensor([[3.0, 5.0], [3.0, 5.0]])
    xs = [base + torch.tensor([*row, *row]) for row in rows]
    assert torch.equal(model_stock(xs, base, filter_wise=filter_wise), base)


def test_obtuse_angles_give_a_negative_ratio() -> None:
    x, y, base = torch.tensor([1.0, 0.0]), torch.tensor([-0.5, 1.0]), torch.zeros(2)
    cosine = -0.5 / math.sqrt(1.25)
    t = 2 * cosine / (1 + cosine)
    assert t < -1
    assert torch.allclose(model_stock([x, y], base), t * (x + y) / 2, rtol=1e-6, atol=0)


def test_short_task_vectors_have_their_true_angle() -> None:
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8])
    merged = model_stock([1e-15 * x, 1e-15 * y], torch.zeros(2))
    assert torch.allclose(1e15 * merged, model_stock([x, y], torch.zeros(2)), rtol=1e-6, atol=0)


@settings(max_examples=100, deadline=None)
@given(
    num_models=st.integers(2, 5),
    shape=st.sampled_from([(), (2,), (9,), (3, 4), (2, 3, 2)]),
    filter_wise=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_formula_for_any_models(num_models: int, shape: tuple[int, ...], filter_wise: bool, seed: int) -> None:
    drawn = case(num_models, filter_wise=filter_wise)
    xs, base = drawn.tensors(shape, torch.float64, seed)
    assert base is not None
    # Task vectors near balance have a ratio that magnifies every rounding; in float64 there is room for it.
    merged = drawn.merge(xs, base, compute_dtype=torch.float64)
    expected = drawn.expected(xs, base)
    ratio = (1 + abs(expected.value).max()) ** 3
    assert (abs(as_float64(merged) - expected.value) < 1e-9 * ratio).all()


def test_declaration() -> None:
    declaration = METHODS.get("model_stock")
    assert declaration.base is BaseUse.REQUIRED
    assert not declaration.base_is_input
    assert (declaration.min_models, declaration.max_models) == (2, None)
    assert declaration.parameter_names() == {"filter_wise": "global"}
    assert declaration.global_parameters().model_dump() == {"filter_wise": False}

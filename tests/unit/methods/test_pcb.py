"""PCB-Merging against its formula in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pydantic import ValidationError

from mergekit_ray.core.declaration import Access, BaseUse
from mergekit_ray.core.registry import METHODS
from support.operands import merge
from support.references import paper as reference
from support.references.merge import Expected
from support.references.paper import as_float64, evaluated, random_models

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(), (1,), (0,), (0, 5), (7,), (64, 33), (3, 5, 7)]
ROUNDINGS = 40
"""Scores differ by the rounding of a few exponentials; in a mean of several models that is a rounding of its terms."""

CASES: list[tuple[tuple[float, ...], tuple[float, ...], float]] = [
    ((1.0, 1.0, 1.0), (0.1, 0.1, 0.1), 1.0),
    ((0.3, -0.5, 0.9), (0.9, 0.2, 0.5), 0.7),
    ((1.0, 1.0), (1.0, 1.0), 1.0),
    ((1.0, 2.0, 1.0, 0.5, 1.0), (0.5, 0.0, 0.3, 0.2, 0.1), -1.3),
    ((0.5,), (0.3,), 1.0),
]


def merged(case: Any, xs: Any, base: torch.Tensor, **options: Any) -> torch.Tensor:
    weights, densities, scale = case
    models = [{"weight": w, "density": d} for w, d in zip(weights, densities, strict=True)]
    return merge("pcb", xs, base, parameters={"lambda": scale}, input_parameters=models, **options)


def expected(case: Any, xs: Any, base: torch.Tensor) -> Expected:
    weights, densities, scale = case
    b = as_float64(base)
    return reference.pcb(b, [as_float64(x) - b for x in xs], weights, densities, scale=scale)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formula(case: Any, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        xs, base = random_models(shape, len(case[0]), dtype)
        result = merged(case, xs, base)
        assert result.dtype == dtype
        assert result.shape == shape
        if base.numel():
            true = expected(case, xs, base)
            assert true.is_stable.mean() > 0.95 or true.is_stable.size < 120
            true.check(result, roundings=ROUNDINGS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_beyond_one_block_and_for_any_chunk_size(case: Any) -> None:
    xs, base = random_models((401, 700), len(case[0]), torch.bfloat16)
    whole = merged(case, xs, base, out_dtype=torch.float32)
    true = expected(case, xs, base)
    assert true.is_stable.mean() > 0.99
    true.check(whole, roundings=ROUNDINGS)
    for chunk_elements in (1 << 16, 9973):
        assert torch.equal(merged(case, xs, base, out_dtype=torch.float32, chunk_elements=chunk_elements), whole)
    models = [{"weight": w, "density": d} for w, d in zip(*case[:2], strict=True)]
    for num_threads in (1, 2):
        again = evaluated(
            "pcb", xs, base, {"lambda": case[2]}, models, out_dtype=torch.float32, num_threads=num_threads
        )
        assert torch.equal(again, whole)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_any_chunk_size_in_any_compute_dtype(case: Any, dtype: torch.dtype) -> None:
    xs, base = random_models((1511,), len(case[0]), dtype)
    whole = merged(case, xs, base, compute_dtype=dtype)
    assert torch.isfinite(whole).all()
    for chunk_elements in (7, 64, 1000):
        assert torch.equal(merged(case, xs, base, compute_dtype=dtype, chunk_elements=chunk_elements), whole)


def test_float64_arithmetic() -> None:
    xs, base = random_models((33, 40), 3)
    result = merged(CASES[1], xs, base, compute_dtype=torch.float64, out_dtype=torch.float64)
    expected(CASES[1], xs, base).check(result, roundings=4 * ROUNDINGS, unit=2.0**-53)


def test_number_of_torch_threads() -> None:
    xs, base = random_models((300_001,), 3)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)  # one_thread of conftest.py sets it back
        results.append(merge("pcb", xs, base))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_number_kept() -> None:
    xs, base = random_models((997,), 1)
    for density in (0.0, 1e-6, 0.1, 0.5, 1.0):
        result = merge("pcb", xs, base, input_parameters=[{"density": density}])
        assert int((result != base).sum()) == math.ceil(density * 997)


def test_one_model_keeps_its_largest_changes() -> None:
    """Its scores grow with the magnitude alone, and a mean of one is itself."""
    xs, base = random_models((1000,), 1, torch.bfloat16)
    ties = merge("ties", xs, base, input_parameters=[{"weight": 1.0, "density": 0.25}])
    result = merge("pcb", xs, base, input_parameters=[{"density": 0.25}])
    assert torch.equal(result, ties)


def test_shared_changes_win() -> None:
    """Of changes of one size, those that the other model makes too."""
    base = torch.zeros(8)
    xs = [torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]), torch.tensor([0.0, 0, 1, 1, 1, 1, 0, 0])]
    result = merge("pcb", xs, base, input_parameters=[{"density": 0.25}] * 2)
    assert torch.allclose(result, torch.tensor([0.0, 0, 1, 1, 0, 0, 0, 0]), rtol=0, atol=1e-6)


def test_equal_models_keep_what_one_does() -> None:
    xs, base = random_models((1000,), 1, torch.bfloat16)
    once = merge("pcb", xs, base, input_parameters=[{"density": 0.25}])
    thrice = merge("pcb", xs * 3, base, input_parameters=[{"density": 0.25}] * 3)
    assert torch.equal(once, thrice)


def test_ties_go_to_the_lowest_index() -> None:
    result = merge("pcb", [torch.ones(10)], torch.zeros(10), input_parameters=[{"density": 0.3}])
    assert result.tolist() == [1.0] * 3 + [0.0] * 7


def test_models_equal_to_the_base_and_zeros() -> None:
    for shape in SHAPES:
        _, base = random_models(shape, 1)
        assert torch.equal(merge("pcb", [base] * 3, base), base)
    assert torch.equal(merge("pcb", [torch.zeros(9)] * 3, torch.zeros(9)), torch.zeros(9))


def test_opposite_models_cancel() -> None:
    delta = torch.arange(-8.0, 9.0)
    result = merge("pcb", [delta, -delta], torch.zeros(17), input_parameters=[{"density": 1.0}] * 2)
    assert torch.equal(result, torch.zeros(17))


def test_cancelled_weights() -> None:
    xs, base = random_models((50,), 1, torch.bfloat16)
    models = [{"weight": 1.0, "density": 0.5}, {"weight": -1.0, "density": 0.5}]
    assert torch.equal(merge("pcb", xs * 2, base, input_parameters=models), base)


def test_tiny_changes() -> None:
    """Whose products are subnormal numbers, or nothing."""
    for size in (1e-20, 3e-22, 1e-30):
        delta = torch.linspace(0.5, 1.0, 40) * size
        result = merge("pcb", [delta, 2 * delta], torch.zeros(40), input_parameters=[{"density": 0.5}] * 2)
        assert torch.isfinite(result).all()
        assert 20 <= int((result != 0).sum()) <= 40


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_formula_for_any_finite_values(data: st.DataObject) -> None:
    num_models = data.draw(st.integers(1, 4))
    size = data.draw(st.integers(1, 30))
    numbers = st.floats(-100, 100, width=16, allow_subnormal=False)
    rows = [
        torch.from_numpy(data.draw(hnp.arrays(np.float16, size, elements=numbers)).astype(np.float32))
        for _ in range(num_models + 1)
    ]
    part = st.lists(st.floats(0, 1), min_size=num_models, max_size=num_models)
    case = (tuple(data.draw(part)), tuple(data.draw(part)), 1.5)
    true = expected(case, rows[1:], rows[0])
    # Equal scores of different elements are decided by their index, if the arithmetic finds them equal.
    scores = reference.pcb_scores([as_float64(x) - as_float64(rows[0]) for x in rows[1:]])
    for score in scores:
        ordered = np.sort(score)
        if size > 1 and np.ptp(score) > 0:
            gaps = np.diff(ordered) / ordered[1:]
            if gaps.min() < 1e-5:
                return
    true.check(merged(case, rows[1:], rows[0]), roundings=10 * ROUNDINGS)


def test_declaration() -> None:
    declaration = METHODS.get("pcb")
    assert declaration.name == "pcb"
    assert declaration.summary.endswith(".")
    assert declaration.base is BaseUse.REQUIRED
    assert declaration.access is Access.REDUCE
    assert not declaration.propagates_non_finite
    assert declaration.parameter_names() == {"weight": "model", "density": "model", "lambda": "global"}
    assert declaration.model_parameters().model_dump() == {"weight": 1.0, "density": 0.1}
    assert all(field.description for field in declaration.model_parameters.model_fields.values())
    with pytest.raises(ValidationError):
        declaration.model_parameters.model_validate({"density": 1.5})

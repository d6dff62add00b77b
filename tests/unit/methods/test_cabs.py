"""CABS against pruning group after group in Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mergekit_ray.core.declaration import Access, BaseUse
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared.protocol import BLOCK_ELEMENTS
from support.operands import merge
from support.references import paper as reference
from support.references.merge import Expected
from support.references.paper import as_float64, evaluated, random_models

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(), (1,), (0,), (0, 5), (7,), (64, 33), (3, 5, 7)]
CASES: list[tuple[tuple[float, ...], dict[str, Any]]] = [
    ((1.0, 1.0, 1.0), {}),
    ((0.3, -0.5, 0.9), {"n": 2, "m": 8, "lambda": 0.7}),
    ((1.0, 2.0), {"n": 3, "m": 7}),
    ((1.0, 1.0, 1.0), {"n": 5, "m": 10}),
    ((0.5,), {"n": 1, "m": 1}),
    ((1.0, 1.0), {"n": 0, "m": 4}),
    ((1.0, 0.5), {"n": 9, "m": 4}),
    ((1.0, 1.0), {"n": 30, "m": 1000}),
]


def merged(case: Any, xs: Any, base: torch.Tensor, **options: Any) -> torch.Tensor:
    return merge("cabs", xs, base, parameters=case[1], input_parameters=[{"weight": w} for w in case[0]], **options)


def expected(case: Any, xs: Any, base: torch.Tensor) -> Expected:
    weights, parameters = case
    # Ranked as the arithmetic sees them, which is float32.
    magnitudes = [as_float64((x.float() - base.float()).abs()) for x in xs]
    owners = reference.cabs_owners(magnitudes, parameters.get("n", 64), parameters.get("m", 256))
    b = as_float64(base)
    kept = [np.where(owners == i, w * (as_float64(xs[i]) - b), 0.0) for i, w in enumerate(weights)]
    change = parameters.get("lambda", 1.0) * np.asarray(sum(kept))
    return Expected(b + change, np.abs(b) + np.abs(change), np.ones_like(b, dtype=bool))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formula(case: Any, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        xs, base = random_models(shape, len(case[0]), dtype)
        result = merged(case, xs, base)
        assert result.dtype == dtype
        assert result.shape == shape
        expected(case, xs, base).check(result, roundings=4)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_any_chunk_size_in_any_compute_dtype(case: Any, dtype: torch.dtype) -> None:
    xs, base = random_models((1511,), len(case[0]), dtype)
    whole = merged(case, xs, base, compute_dtype=dtype)
    for chunk_elements in (7, 64, 1000):
        assert torch.equal(merged(case, xs, base, compute_dtype=dtype, chunk_elements=chunk_elements), whole)


@pytest.mark.parametrize("m", [256, 1000, 100_000, BLOCK_ELEMENTS])
def test_groups_across_blocks(m: int) -> None:
    """Against a sort of each group, over two blocks and a bit; several cuts, by the evaluator and the plain one."""
    xs, base = random_models((2 * BLOCK_ELEMENTS + 777,), 2, torch.bfloat16)
    case = ((1.0, 1.0), {"n": m // 4, "m": m})
    whole = merged(case, xs, base, out_dtype=torch.float32)
    free = np.ones(base.numel(), dtype=bool)
    change = np.zeros(base.numel())
    for x in xs:
        delta = as_float64(x) - as_float64(base)
        for start in range(0, base.numel(), m):
            group = slice(start, min(start + m, base.numel()))
            magnitude = np.abs(delta[group]) * free[group]
            count = -(-(m // 4) * len(magnitude) // m)
            kept = start + np.argsort(-magnitude, kind="stable")[:count]
            kept = kept[np.abs(delta[kept]) * free[kept] > 0]
            change[kept] = delta[kept]
            free[kept] = False
    assert np.array_equal(as_float64(whole), (as_float64(base) + change).astype(np.float32))
    for num_threads, chunk_elements in ((1, 1 << 16), (2, 99_991)):
        again = evaluated(
            "cabs",
            xs,
            base,
            case[1],
            out_dtype=torch.float32,
            num_threads=num_threads,
            chunk_elements=chunk_elements,
        )
        assert torch.equal(again, whole)


def test_number_of_torch_threads() -> None:
    xs, base = random_models((300_001,), 3)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)  # one_thread of conftest.py sets it back
        results.append(merge("cabs", xs, base, parameters={"n": 70, "m": 300}))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_case_by_hand() -> None:
    base = torch.zeros(10)
    xs = [
        torch.tensor([1.0, -4.0, 3.0, 2.0, 0.0, 0.0, 5.0, 0.0, 7.0, 8.0]),
        torch.tensor([9.0, 9.0, 9.0, 1.0, 1.0, -2.0, 3.0, 0.0, 6.0, 5.0]),
    ]
    result = merge("cabs", xs, base, parameters={"n": 2, "m": 4})
    # 2 of 4: -4 and 3, then 9 and 1 of what is left; 5 alone, for zeros take no place; of a group of two, one each.
    assert result.tolist() == [9.0, -4.0, 3.0, 1.0, 1.0, -2.0, 5.0, 0.0, 6.0, 8.0]
    swapped = merge("cabs", xs[::-1], base, parameters={"n": 2, "m": 4})
    assert swapped.tolist() == [9.0, 9.0, 3.0, 2.0, 0.0, -2.0, 3.0, 0.0, 6.0, 8.0]


def test_no_two_models_overlap() -> None:
    xs, base = random_models((64, 64), 4, torch.bfloat16)
    kept = [
        merge("cabs", xs, base, input_parameters=[{"weight": float(i == j)} for j in range(4)]) != base
        for i in range(4)
    ]
    for i in range(4):
        # A few bfloat16 changes are zero and are not kept; of what is, a quarter of each group and no more.
        counts = kept[i].view(-1, 256).sum(dim=1)
        assert counts.max() <= 64
        assert counts.float().mean() > 60
        assert all(not (kept[i] & kept[j]).any() for j in range(i))


def test_equal_changes_go_to_the_lowest_index() -> None:
    result = merge("cabs", [torch.ones(8), torch.full((8,), -2.0)], torch.zeros(8), parameters={"n": 1, "m": 4})
    assert result.tolist() == [1.0, -2.0, 0.0, 0.0, 1.0, -2.0, 0.0, 0.0]


def test_everything_of_one_model() -> None:
    xs, base = random_models((100,), 2, torch.bfloat16)
    assert torch.equal(merge("cabs", xs[:1], base, parameters={"n": 256, "m": 256}), xs[0])
    assert torch.equal(merge("cabs", [base, xs[1]], base, parameters={"n": 4, "m": 4}), xs[1])


def test_models_equal_to_the_base_and_zeros() -> None:
    for shape in SHAPES:
        _, base = random_models(shape, 1)
        assert torch.equal(merge("cabs", [base] * 3, base), base)
    assert torch.equal(merge("cabs", [torch.zeros(9)] * 3, torch.zeros(9)), torch.zeros(9))


def test_opposite_models() -> None:
    """They do not cancel: what one keeps, the other may not."""
    delta = torch.tensor([4.0, 3.0, 2.0, 1.0])
    result = merge("cabs", [delta, -delta], torch.zeros(4), parameters={"n": 2, "m": 4})
    assert result.tolist() == [4.0, 3.0, -2.0, -1.0]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_formula_for_any_values(data: st.DataObject) -> None:
    num_models = data.draw(st.integers(1, 4))
    size = data.draw(st.integers(0, 40))
    levels = st.lists(st.integers(-4, 4), min_size=size, max_size=size)  # few, so that many are equal
    rows = [torch.tensor(data.draw(levels), dtype=torch.float32) for _ in range(num_models + 1)]
    parameters = {"n": data.draw(st.integers(0, 10)), "m": data.draw(st.integers(1, 12))}
    case = ((1.0,) * num_models, parameters)
    chunk_elements = data.draw(st.integers(1, 20))
    result = merged(case, rows[1:], rows[0], chunk_elements=chunk_elements)
    assert np.array_equal(as_float64(result), expected(case, rows[1:], rows[0]).value)


def test_declaration() -> None:
    declaration = METHODS.get("cabs")
    assert declaration.name == "cabs"
    assert declaration.summary.endswith(".")
    assert declaration.base is BaseUse.REQUIRED
    assert declaration.access is Access.REDUCE
    assert not declaration.propagates_non_finite
    assert declaration.parameter_names() == {"weight": "model", "n": "global", "m": "global", "lambda": "global"}
    assert declaration.global_parameters().model_dump(by_alias=True) == {"lambda": 1.0, "n": 64, "m": 256}
    assert all(field.description for field in declaration.global_parameters.model_fields.values())
    for wrong in ({"n": -1}, {"m": 0}, {"m": 2.5}, {"m": BLOCK_ELEMENTS + 1}):
        with pytest.raises(ValidationError):
            declaration.global_parameters.model_validate(wrong)

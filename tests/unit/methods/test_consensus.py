"""Consensus merging against its formula in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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
ROUNDINGS = 8
NAMES = ["consensus_ta", "consensus_ties"]


@dataclass(frozen=True)
class Case:
    method: str
    weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    lambdas: tuple[float, ...] = (0.4, 0.4, 0.4)
    densities: tuple[float, ...] = (0.2, 0.2, 0.2)
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def input_parameters(self) -> list[dict[str, float]]:
        rows = zip(self.weights, self.lambdas, self.densities, strict=True)
        names = ("weight", "tall_mask_lambda", *(("density",) if self.method == "consensus_ties" else ()))
        return [dict(zip(names, row, strict=False)) for row in rows]

    def merge(self, xs: Sequence[torch.Tensor], base: torch.Tensor, **options: Any) -> torch.Tensor:
        return merge(
            self.method, xs, base, parameters=self.parameters, input_parameters=self.input_parameters, **options
        )

    def expected(self, xs: Sequence[torch.Tensor], base: torch.Tensor) -> Expected:
        b = as_float64(base)
        deltas = [as_float64(x) - b for x in xs]
        is_stable = np.ones(b.shape, dtype=bool)
        if self.method == "consensus_ta":
            merged = np.asarray(sum(w * delta for w, delta in zip(self.weights, deltas, strict=True)))
        else:
            ranked = [as_float64((x.float() - base.float()).abs()) for x in xs]
            merged, is_stable = reference.ties_sum(deltas, ranked, self.weights, self.densities)
        expected = reference.consensus(
            b,
            deltas,
            merged,
            self.lambdas,
            k=self.parameters.get("k", 2),
            scale=self.parameters.get("lambda", 1.0),
        )
        return Expected(expected.value, expected.magnitude, expected.is_stable & is_stable)


CASES = [
    Case("consensus_ta"),
    Case("consensus_ta", (0.3, 0.5, 0.9, -0.2), (0.2, 0.6, 1.0, 0.0), (1.0,) * 4, {"lambda": 0.7, "k": 3}),
    Case("consensus_ta", parameters={"k": 1}),
    Case("consensus_ta", (0.5,), (0.4,), (1.0,)),
    Case("consensus_ties"),
    Case("consensus_ties", (0.3, 0.5, 0.9), (0.2, 0.6, 1.0), (0.9, 0.5, 1.0), {"lambda": -0.7, "k": 1}),
    Case("consensus_ties", (1.0, 1.0), (0.2, 0.3), (0.0, 1.0), {"k": 2}),
]


def name_of(case: Case) -> str:
    return f"{case.method}-{len(case.weights)}-{case.parameters}"


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formula(case: Case, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        xs, base = random_models(shape, len(case.weights), dtype)
        result = case.merge(xs, base)
        assert result.dtype == dtype
        assert result.shape == shape
        expected = case.expected(xs, base)
        assert np.count_nonzero(~expected.is_stable) <= base.numel() // 20 + 2
        expected.check(result, roundings=ROUNDINGS)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_beyond_one_block_and_for_any_chunk_size(case: Case) -> None:
    xs, base = random_models((401, 700), len(case.weights), torch.bfloat16)
    whole = case.merge(xs, base, out_dtype=torch.float32)
    case.expected(xs, base).check(whole, roundings=ROUNDINGS)
    for chunk_elements in (1 << 16, 9973):
        assert torch.equal(case.merge(xs, base, out_dtype=torch.float32, chunk_elements=chunk_elements), whole)
    for num_threads in (1, 2):
        again = evaluated(
            case.method,
            xs,
            base,
            case.parameters,
            case.input_parameters,
            out_dtype=torch.float32,
            num_threads=num_threads,
        )
        assert torch.equal(again, whole)


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_any_chunk_size_in_any_compute_dtype(case: Case, dtype: torch.dtype) -> None:
    xs, base = random_models((1511,), len(case.weights), dtype)
    whole = case.merge(xs, base, compute_dtype=dtype)
    for chunk_elements in (7, 64, 1000):
        assert torch.equal(case.merge(xs, base, compute_dtype=dtype, chunk_elements=chunk_elements), whole)


@pytest.mark.parametrize("name", NAMES)
def test_number_of_torch_threads(name: str) -> None:
    xs, base = random_models((300_001,), 3)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)  # one_thread of conftest.py sets it back
        results.append(merge(name, xs, base))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_case_by_hand() -> None:
    """Columns: shared by both, selfish, opposed (in no mask), unchanged."""
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    xs = [base + torch.tensor([1.0, 2.0, 1.0, 0.0]), base + torch.tensor([1.0, 0.0, -1.0, 0.0])]

    def merged(k: int, **model: float) -> list[float]:
        return merge("consensus_ta", xs, base, parameters={"k": k}, input_parameters=[model] * 2).tolist()

    assert merged(0) == [3.0, 3.0, 1.0, 1.0]
    assert merged(1) == [3.0, 3.0, 1.0, 1.0]
    assert merged(2) == [3.0, 1.0, 1.0, 1.0]
    assert merged(3) == [1.0, 1.0, 1.0, 1.0]
    # |1| >= 1.01 · |2 − 1| fails for both
    assert merged(1, tall_mask_lambda=1.01)[0] == 1.0
    assert merged(2, tall_mask_lambda=1.0)[0] == 3.0


def test_k_zero_is_task_arithmetic() -> None:
    xs, base = random_models((50, 7), 3)
    weights = [{"weight": w} for w in (0.3, 0.5, -1.2)]
    pruned = merge("consensus_ta", xs, base, parameters={"k": 0, "lambda": 0.6}, input_parameters=weights)
    plain = merge("task_arithmetic", xs, base, parameters={"lambda": 0.6}, input_parameters=weights)
    assert torch.allclose(pruned, plain, rtol=2e-7, atol=2e-7)  # λ is applied to the sum or to the weights


def test_k_zero_is_ties_without_a_mean() -> None:
    xs, base = random_models((50, 7), 3)
    models = [{"weight": w, "density": d} for w, d in ((0.3, 0.5), (0.5, 0.2), (1.2, 1.0))]
    pruned = merge("consensus_ties", xs, base, parameters={"k": 0}, input_parameters=models)
    plain = merge("ties", xs, base, parameters={"normalize": False}, input_parameters=models)
    assert torch.allclose(pruned, plain, rtol=2e-7, atol=2e-7)  # added to the base in one rounding or two


@pytest.mark.parametrize("name", NAMES)
def test_models_equal_to_the_base_and_zeros(name: str) -> None:
    _, base = random_models((1000,), 1)
    assert torch.equal(merge(name, [base] * 3, base), base)
    assert torch.equal(merge(name, [torch.zeros(9)] * 3, torch.zeros(9)), torch.zeros(9))


def test_one_model_has_no_consensus() -> None:
    xs, base = random_models((100,), 1)
    assert torch.equal(merge("consensus_ta", xs, base), base)
    assert torch.equal(merge("consensus_ta", xs, base, parameters={"k": 1}), base + (xs[0] - base))


def test_opposite_models_cancel() -> None:
    delta = torch.arange(-8.0, 9.0)
    xs, base = [delta, -delta], torch.zeros(17)
    assert torch.equal(merge("consensus_ta", xs, base), base)
    # TIES elects plus where signs are even, so that one of the two is left.
    assert torch.equal(merge("consensus_ties", xs, base, input_parameters=[{"density": 1.0}] * 2), delta.abs())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("factor", [0.0, 1.0])
@pytest.mark.parametrize("k", [0, 2, 9])
def test_non_finite_inputs_show_in_the_sum(bad: float, factor: float, k: int) -> None:
    for damaged in range(3):
        tensors = [torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 2.0]), torch.tensor([0.0, 5.0])]
        tensors[damaged][1] = bad
        for scale in (factor, 1.0):
            result = merge(
                "consensus_ta",
                tensors[:2],
                tensors[2],
                parameters={"k": k, "lambda": scale},
                input_parameters=[{"weight": factor}] * 2,
            )
            assert not result[1].isfinite()


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_formula_for_any_finite_values(data: st.DataObject) -> None:
    num_models = data.draw(st.integers(1, 4))
    size = data.draw(st.integers(0, 30))
    numbers = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
    rows = [
        torch.from_numpy(data.draw(hnp.arrays(np.float32, size, elements=numbers)).copy())
        for _ in range(num_models + 1)
    ]
    draw = st.lists(st.floats(-2, 2).map(lambda w: round(w, 3)), min_size=num_models, max_size=num_models)
    weights = tuple(data.draw(draw))
    lambdas = tuple(abs(w) for w in data.draw(draw))
    case = Case(
        "consensus_ta", weights, lambdas, (1.0,) * num_models, {"k": data.draw(st.integers(0, 5)), "lambda": 1.5}
    )
    case.expected(rows[1:], rows[0]).check(case.merge(rows[1:], rows[0]), roundings=ROUNDINGS + 3 * num_models)


def test_declarations() -> None:
    ta, ties = (METHODS.get(name) for name in NAMES)
    assert ta.access is Access.ELEMENTWISE
    assert ties.access is Access.REDUCE
    names = {"weight": "model", "tall_mask_lambda": "model", "lambda": "global", "k": "global"}
    assert ta.parameter_names() == names
    assert ties.parameter_names() == names | {"density": "model"}
    assert ta.propagates_non_finite
    assert not ties.propagates_non_finite
    for name, declaration in zip(NAMES, (ta, ties), strict=True):
        assert declaration.name == name
        assert declaration.summary.endswith(".")
        assert declaration.base is BaseUse.REQUIRED
        assert declaration.global_parameters().model_dump(by_alias=True) == {"lambda": 1.0, "k": 2}
        assert declaration.model_parameters().model_dump()["tall_mask_lambda"] == 0.4
        for model in (declaration.model_parameters, declaration.global_parameters):
            assert all(field.description for field in model.model_fields.values())
        for wrong in ({"k": -1}, {"k": 1.5}):
            with pytest.raises(ValidationError):
                declaration.global_parameters.model_validate(wrong)
        with pytest.raises(ValidationError):
            declaration.model_parameters.model_validate({"tall_mask_lambda": -0.1})

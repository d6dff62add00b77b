"""Every method against its formula in float64: dtypes, shapes, chunk sizes, parameters."""

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

from support.operands import merge
from support.references import merge as reference
from support.references.merge import Array, Expected

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(), (1,), (0,), (0, 5), (7,), (64, 33), (3, 5, 7)]


@dataclass(frozen=True)
class Case:
    """A method with parameters, as YAML names."""

    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    weights: tuple[float, ...] = ()
    densities: tuple[float, ...] = ()

    @property
    def num_models(self) -> int:
        return len(self.weights) or 1

    @property
    def needs_base(self) -> bool:
        return self.method not in {"linear", "passthrough"}

    @property
    def input_parameters(self) -> list[dict[str, float]]:
        if self.method == "passthrough":
            return [{"scale": 0.7}]
        given = [{"weight": weight} for weight in self.weights] or [{}]
        for each, density in zip(given, self.densities, strict=False):
            each["density"] = density
        return given

    def merge(self, xs: Sequence[torch.Tensor], base: torch.Tensor, **options: Any) -> torch.Tensor:
        return merge(
            self.method,
            xs,
            base if self.needs_base else None,
            parameters=self.parameters,
            input_parameters=self.input_parameters,
            **options,
        )

    def expected(self, xs: Sequence[torch.Tensor], base: torch.Tensor) -> Expected:
        models, b = [as_float64(x) for x in xs], as_float64(base)
        normalize = self.parameters.get("normalize", self.method in {"linear", "ties"})
        scale = self.parameters.get("lambda", 1.0)
        deltas = [x - b for x in models]
        match self.method:
            case "linear":
                return reference.linear(models, self.weights, normalize=normalize)
            case "passthrough":
                return reference.linear(models, [0.7], normalize=False)
            case "slerp":
                return reference.slerp(b, models[0], self.parameters["t"])
            case "task_arithmetic":
                return reference.added_to_base(b, deltas, self.weights, normalize=normalize, scale=scale)
            case "ties":
                trimmed = [
                    reference.rescaled(
                        delta,
                        # Ranked as the arithmetic sees them, which is float32.
                        reference.keep_largest(as_float64((x.float() - base.float()).abs()), density),
                        rescale=self.parameters.get("rescale", False),
                    )
                    for x, delta, density in zip(xs, deltas, self.densities, strict=True)
                ]
                return reference.elected(b, trimmed, self.weights, normalize=normalize, scale=scale)
            case _:
                trimmed = [
                    reference.rescaled(
                        delta,
                        reference.keep_random(f"model {index}", delta.shape, density),
                        rescale=self.parameters.get("rescale", True),
                    )
                    for index, (delta, density) in enumerate(zip(deltas, self.densities, strict=True))
                ]
                total = reference.elected if self.method == "dare_ties" else reference.added_to_base
                return total(b, trimmed, self.weights, normalize=normalize, scale=scale)


CASES = [
    Case("linear", weights=(0.3, 0.5, 0.9)),
    Case("linear", {"normalize": False}, weights=(0.3, -0.5, 1.7)),
    Case("linear", weights=(2.0,)),
    Case("passthrough"),
    Case("slerp", {"t": 0.3}),
    Case("slerp", {"t": 0.0}),
    Case("slerp", {"t": 1.0}),
    Case("task_arithmetic", weights=(0.3, 0.5, 0.9)),
    Case("task_arithmetic", {"normalize": True, "lambda": 0.7}, weights=(0.3, -0.1, 0.9)),
    Case("ties", weights=(0.3, 0.5, 0.9), densities=(0.2, 0.5, 1.0)),
    Case("ties", {"normalize": False, "lambda": 1.3}, weights=(1.0, 1.0), densities=(0.5, 0.1)),
    Case("ties", {"int8_mask": 1.0}, weights=(0.4, -0.3, 0.0), densities=(0.7, 0.9, 0.3)),
    Case("ties", {"rescale": True}, weights=(0.3, 0.5, 0.9), densities=(0.2, 0.5, 1.0)),
    Case("ties", {"rescale": True, "normalize": False}, weights=(0.5, 0.7), densities=(0.0, 0.4)),
    Case("ties", weights=(0.5,), densities=(0.0,)),
    Case("dare_linear", weights=(0.3, 0.5), densities=(0.2, 0.7)),
    Case("dare_linear", {"rescale": False, "normalize": True}, weights=(0.3, 0.5, 0.1), densities=(0.2, 0.0, 1.0)),
    Case("dare_ties", weights=(0.3, 0.5, 0.9), densities=(0.2, 0.7, 1.0)),
    Case("dare_ties", {"normalize": True, "rescale": 0, "lambda": 0.5}, weights=(1.0, -0.5), densities=(0.9, 0.4)),
]
ROUNDINGS = 8
"""Float32 roundings, each at most 2^-24 of the terms' magnitudes, that the longest formula (dare_ties of 3) needs."""


def as_float64(x: torch.Tensor) -> Array:
    return x.to(torch.float64).numpy()


def models(
    case: Case, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0
) -> tuple[list[torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    xs = [(base + 0.5 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(case.num_models)]
    return xs, base.to(dtype)


def name_of(case: Case) -> str:
    return "-".join(
        [case.method, *(f"{name}={value}" for name, value in case.parameters.items()), str(case.num_models)]
    )


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formula(case: Case, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        xs, base = models(case, shape, dtype)
        result = case.merge(xs, base)
        assert result.dtype == dtype
        assert result.shape == shape
        case.expected(xs, base).check(result, roundings=ROUNDINGS)


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_one_rounding_of_a_16_bit_output(case: Case, dtype: torch.dtype) -> None:
    """Where terms do not cancel, float32 arithmetic leaves nothing but the rounding of the output: half an ulp."""
    xs, base = models(case, (40, 50), dtype)
    expected = case.expected(xs, base)
    steady = expected.is_stable & (np.abs(expected.value) > expected.magnitude / 16)
    errors = np.abs(as_float64(case.merge(xs, base)) - expected.value) / reference.ulp(expected.value, dtype)
    assert steady.sum() > 1000
    assert errors[steady].max() < 0.51


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_beyond_one_block_and_for_any_chunk_size(case: Case) -> None:
    xs, base = models(case, (401, 500), torch.bfloat16)
    whole = case.merge(xs, base, out_dtype=torch.float32)
    if case.method not in {"dare_linear", "dare_ties"}:  # whose reference counts in Python: see test_random_mask.py
        case.expected(xs, base).check(whole, roundings=ROUNDINGS)
    for chunk_elements in (1 << 16, 9973, 1000):
        assert torch.equal(case.merge(xs, base, out_dtype=torch.float32, chunk_elements=chunk_elements), whole)


@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_any_chunk_size_in_any_compute_dtype(case: Case, dtype: torch.dtype) -> None:
    xs, base = models(case, (2011,), dtype)
    whole = case.merge(xs, base, compute_dtype=dtype)
    assert torch.isfinite(whole).all()
    for chunk_elements in (1, 7, 64, 1000):
        assert torch.equal(case.merge(xs, base, compute_dtype=dtype, chunk_elements=chunk_elements), whole)


# The reference for ties ranks in float32; test_selection.py covers float64.
@pytest.mark.parametrize("case", [case for case in CASES if case.method != "ties"], ids=name_of)
def test_float64_arithmetic(case: Case) -> None:
    xs, base = models(case, (33, 40), torch.float32)
    result = case.merge(xs, base, compute_dtype=torch.float64, out_dtype=torch.float64)
    case.expected(xs, base).check(result, roundings=4 * ROUNDINGS, unit=2.0**-53)


@pytest.mark.parametrize("case", [case for case in CASES if case.needs_base and case.method != "slerp"], ids=name_of)
def test_models_equal_to_the_base_leave_it_bit_for_bit(case: Case) -> None:
    _, base = models(case, (1000,), torch.float32)
    assert torch.equal(case.merge([base] * case.num_models, base), base)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_zero_tensors(case: Case) -> None:
    zeros = torch.zeros(300)
    assert torch.equal(case.merge([zeros] * case.num_models, zeros), zeros)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_inputs_are_not_changed(case: Case) -> None:
    xs, base = models(case, (100,), torch.float32)
    before = [x.clone() for x in (*xs, base)]
    case.merge(xs, base)
    assert all(torch.equal(x, y) for x, y in zip((*xs, base), before, strict=True))


FINITE = st.floats(-1e4, 1e4, width=32, allow_subnormal=True)
WEIGHTS = st.floats(-2.0, 2.0).map(lambda w: round(w, 3))
METHODS = ["linear", "slerp", "task_arithmetic", "ties", "dare_linear", "dare_ties"]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_formula_for_any_finite_values(data: st.DataObject) -> None:
    method = data.draw(st.sampled_from(METHODS))
    num_models = 1 if method == "slerp" else data.draw(st.integers(1, 4))
    size = data.draw(st.integers(0, 40))
    rows = [
        torch.from_numpy(data.draw(hnp.arrays(np.float32, size, elements=FINITE)).copy()) for _ in range(num_models + 1)
    ]
    parameters: dict[str, Any] = {"t": data.draw(st.floats(0, 1))} if method == "slerp" else {}
    weights: tuple[float, ...] = ()
    if method != "slerp":
        weights = tuple(data.draw(st.lists(WEIGHTS, min_size=num_models, max_size=num_models)))
        # Normalising weights that nearly cancel magnifies every rounding; that they may not cancel is tested elsewhere.
        may_normalize = abs(sum(weights)) > 0.1
        if method in {"ties", "dare_ties"}:
            may_normalize = may_normalize and min(weights) >= 0
        parameters["normalize"] = may_normalize and data.draw(st.booleans())
    if method not in {"linear", "slerp"}:
        parameters["lambda"] = round(data.draw(st.floats(-2, 2)), 3)
    densities: tuple[float, ...] = ()
    if method in {"ties", "dare_linear", "dare_ties"}:
        densities = tuple(data.draw(st.lists(st.floats(0, 1), min_size=num_models, max_size=num_models)))
    if method.startswith("dare"):
        parameters["rescale"] = data.draw(st.booleans())
    case = Case(method, parameters, weights, densities)
    expected = case.expected(rows[1:], rows[0])
    expected.check(case.merge(rows[1:], rows[0]), roundings=ROUNDINGS + num_models)

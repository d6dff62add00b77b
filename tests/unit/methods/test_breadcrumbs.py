"""Breadcrumbs against its formula: what is kept, what becomes of it, and that it never depends on how it is cut."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mergekit_ray.core.declaration import Access, BaseUse
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.expressions import Merge
from mergekit_ray.core.registry import METHODS
from mergekit_ray.core.tensors import TensorSpec
from support.memory_inputs import Inputs, evaluate
from support.operands import merge
from support.references import merge as reference
from support.references import trimming

NAMES = ["breadcrumbs", "breadcrumbs_ties"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(), (1,), (0,), (0, 5), (7,), (64, 33), (3, 5, 7)]
SETTINGS: list[tuple[dict[str, Any], list[dict[str, float]]]] = [
    ({}, [{"weight": 0.5, "density": 0.5}, {"weight": 0.3, "density": 0.7, "gamma": 0.1}]),
    ({"normalize": True, "lambda": 0.7}, [{"weight": 0.5, "density": 0.3, "gamma": 0.2}, {"weight": 0.9}]),
    ({"rescale": True}, [{"weight": 1.0, "density": 0.4, "gamma": 0.3}, {"weight": 0.4, "density": 0.2, "gamma": 0.9}]),
    ({}, [{"weight": 1.0, "density": 0.0, "gamma": 0.5}]),
    ({"rescale": True, "normalize": True}, [{"weight": 0.5, "density": 0.5, "gamma": 0.0}]),
]


def tensors(count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], Any]:
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(shape, generator=generator)
    xs = [(base + 0.5 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(count)]
    return xs, base.to(dtype)


def expected(
    name: str, xs: list[torch.Tensor], base: torch.Tensor, parameters: dict[str, Any], each: list[dict[str, float]]
) -> reference.Expected:
    b = base.double().numpy()
    trimmed = []
    for x, own in zip(xs, each, strict=True):
        ranked = (x.float() - base.float()).abs().numpy()
        mask = trimming.keep_next_largest(ranked, own.get("density", 1.0), own.get("gamma", 0.01))
        delta = x.double().numpy() - b
        trimmed.append(reference.rescaled(delta, mask, rescale=parameters.get("rescale", False)))
    total = reference.elected if name.endswith("ties") else reference.added_to_base
    weights = [own["weight"] for own in each]
    scale = parameters.get("lambda", 1.0)
    return total(b, trimmed, weights, normalize=parameters.get("normalize", False), scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("parameters", "each"), SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_formula(name: str, parameters: dict[str, Any], each: list[dict[str, float]], dtype: torch.dtype) -> None:
    for shape in SHAPES:
        xs, base = tensors(len(each), shape, dtype)
        result = merge(name, xs, base, parameters=parameters, input_parameters=each)
        assert (result.dtype, result.shape) == (dtype, shape)
        expected(name, xs, base, parameters, each).check(result, roundings=12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_any_chunk_size_in_any_compute_dtype(name: str, dtype: torch.dtype) -> None:
    parameters, each = SETTINGS[2]
    xs, base = tensors(2, (2011,), dtype)
    whole = merge(name, xs, base, parameters=parameters, input_parameters=each, compute_dtype=dtype)
    assert torch.isfinite(whole).all()
    for chunk_elements in (1, 7, 64, 1000):
        cut = merge(
            name,
            xs,
            base,
            parameters=parameters,
            input_parameters=each,
            compute_dtype=dtype,
            chunk_elements=chunk_elements,
        )
        assert torch.equal(cut, whole)


@pytest.mark.parametrize("name", NAMES)
def test_any_cut_and_any_number_of_threads(name: str) -> None:
    parameters, each = SETTINGS[2]
    xs, base = tensors(2, (801, 701), torch.bfloat16)
    inputs = Inputs()
    tree = Merge(
        name,
        TensorSpec("out", DType.F32, (801, 701)),
        tuple(inputs.load(f"m{i}", x) for i, x in enumerate(xs)),
        inputs.load("base", base),
        parameters,
        tuple(each),
        ("a", "b"),
    )
    whole = evaluate(tree, inputs)
    expected(name, xs, base, parameters, each).check(whole, roundings=12)
    for num_threads, chunk_elements in ((2, 1 << 16), (3, 9973)):
        found = evaluate(tree, inputs, num_threads=num_threads, chunk_elements=chunk_elements)
        assert torch.equal(found.view(torch.int32), whole.view(torch.int32))


def kept(delta: torch.Tensor, density: float, gamma: float) -> torch.Tensor:
    """Mask of what is left of a task vector over a base of zeros."""
    each = [{"weight": 1.0, "density": density, "gamma": gamma}]
    merged = merge("breadcrumbs", [delta], torch.zeros_like(delta), input_parameters=each)
    assert torch.equal(merged[merged != 0], delta[merged != 0])
    return merged != 0


@pytest.mark.parametrize("density", [0.0, 0.001, 0.3, 0.75, 0.99, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.01, 0.3, 0.6, 1.0])
def test_exactly_k_are_kept_after_the_dropped(density: float, gamma: float) -> None:
    delta = torch.randn(5003, generator=torch.Generator().manual_seed(1))
    order = delta.abs().argsort(descending=True)
    count = math.floor(density * 5003)
    dropped = min(math.floor(gamma * 5003), 5003 - count)
    places = kept(delta, density, gamma)[order].nonzero().view(-1).tolist()
    assert places == list(range(dropped, dropped + count))


def test_of_equal_ones_the_lowest_indices_are_dropped_as_too_large_and_the_next_kept() -> None:
    delta = torch.full((1000,), 2.0)
    delta[1::2] = -2.0
    index = torch.arange(1000)
    assert torch.equal(kept(delta, 0.3, 0.1), (index >= 100) & (index < 400))


def test_no_gamma_is_the_trim_of_ties() -> None:
    delta = (torch.randn(3000, generator=torch.Generator().manual_seed(2)) * 4).round()
    mask = reference.keep_largest(delta.abs().numpy(), 0.4) & (delta != 0).numpy()
    assert np.array_equal(kept(delta, 0.4, 0.0).numpy(), mask)


def test_rescaling_restores_the_l1_norm() -> None:
    xs, base = tensors(1, (4000,), torch.float64)
    each = [{"weight": 1.0, "density": 0.3, "gamma": 0.2}]
    merged = merge(
        "breadcrumbs", xs, base, parameters={"rescale": True}, input_parameters=each, compute_dtype=torch.float64
    )
    assert float((merged - base).abs().sum()) == pytest.approx(float((xs[0] - base).abs().sum()), rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_models_equal_to_the_base_leave_it_bit_for_bit(name: str) -> None:
    _, base = tensors(0, (1000,))
    each = [{"weight": 0.5, "density": 0.5}, {"weight": -0.5, "density": 0.2}]
    for rescale in (False, True):
        result = merge(name, [base, base], base, parameters={"rescale": rescale}, input_parameters=each)
        assert torch.equal(result, base)


def test_cancelling_weights_cannot_be_normalised() -> None:
    each = [{"weight": 1.0}, {"weight": -1.0}]
    with pytest.raises(MergeError, match="sum to 0"):
        merge("breadcrumbs", [torch.ones(3)] * 2, torch.zeros(3), parameters={"normalize": True}, input_parameters=each)
    opposite = [torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -2.0])]
    each = [{"weight": 1.0, "gamma": 0.0}] * 2
    assert merge("breadcrumbs_ties", opposite, torch.zeros(2), input_parameters=each).tolist() == [1.0, 2.0]


@settings(max_examples=100, deadline=None)
@given(
    levels=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=60),
    repeats=st.integers(1, 3),
    density=st.floats(0, 1),
    gamma=st.floats(0, 1),
)
def test_any_values(levels: list[float], repeats: int, density: float, gamma: float) -> None:
    delta = torch.tensor(levels * repeats)
    mask = trimming.keep_next_largest(delta.abs().numpy(), density, gamma)
    assert np.array_equal(kept(delta, density, gamma).numpy(), mask & (delta != 0).numpy())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_damaged_inputs_are_named(name: str, bad: float) -> None:
    """They pass through the statistics, whose numbers they spoil, to the check that names the model."""
    xs, base = tensors(1, (30, 20))
    xs[0][7, 3] = bad
    inputs = Inputs()
    loads, spec = (inputs.load("damaged", xs[0]),), TensorSpec("out", DType.F32, (30, 20))
    tree = Merge(
        name, spec, loads, inputs.load("base", base), {"rescale": True}, ({"weight": 1.0, "density": 0.5},), ("key",)
    )
    with pytest.raises(MergeError, match="damaged"):
        evaluate(tree, inputs)


@pytest.mark.parametrize("name", NAMES)
def test_declaration(name: str) -> None:
    declared = METHODS.get(name)
    assert declared.parameter_names() == {
        "weight": "model",
        "density": "model",
        "gamma": "model",
        "normalize": "global",
        "rescale": "global",
        "lambda": "global",
    }
    assert declared.model_parameters(weight=1.0).model_dump() == {"weight": 1.0, "density": 1.0, "gamma": 0.01}
    assert declared.global_parameters().model_dump() == {"normalize": False, "rescale": False, "lambda_": 1.0}
    assert (declared.base, declared.access, declared.min_models) == (BaseUse.REQUIRED, Access.REDUCE, 1)
    assert not declared.propagates_non_finite
    for gamma in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValidationError, match="gamma"):
            declared.model_parameters(weight=1.0, gamma=gamma)

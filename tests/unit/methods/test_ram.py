"""RAM and RAM+ against their formulas."""

from __future__ import annotations

import math
from typing import Any

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
from mergekit_ray.methods import ram
from support.memory_inputs import Inputs, evaluate
from support.operands import MemoryChunk, MemoryOperands, merge
from support.references import trimming
from support.references.merge import Expected

NAMES = ["ram", "ramplus_tl"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(), (1,), (0,), (0, 5), (7,), (64, 33), (3, 5, 7)]
SETTINGS: list[dict[str, float]] = [
    {"epsilon": 0.5},
    {},
    {"epsilon": 0.8, "r": 0.5, "alpha": 100.0},
    {"epsilon": 0.8, "r": -2.0, "alpha": 0.3},
    {"epsilon": 50.0, "r": 1.0, "alpha": 1.0},
    {"epsilon": 0.0, "r": 0.3, "alpha": 0.0},
]


def tensors(count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], Any]:
    generator = torch.Generator().manual_seed(8)
    base = torch.randn(shape, generator=generator)
    xs = [(base + 0.5 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(count)]
    return xs, base.to(dtype)


def given_to(name: str, parameters: dict[str, float]) -> dict[str, float]:
    return parameters if name == "ramplus_tl" else {k: v for k, v in parameters.items() if k == "epsilon"}


def expected(name: str, xs: list[torch.Tensor], base: torch.Tensor, parameters: dict[str, float]) -> Expected:
    own = {"epsilon": 1e-5} | ({"r": 0.1, "alpha": 0.2} if name == "ramplus_tl" else {}) | given_to(name, parameters)
    return trimming.ram(base.double().numpy(), [(x.float() - base.float()).numpy() for x in xs], **own)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_models", [1, 2, 3])
@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_formula(name: str, parameters: dict[str, float], num_models: int, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        xs, base = tensors(num_models, shape, dtype)
        result = merge(name, xs, base, parameters=given_to(name, parameters))
        assert (result.dtype, result.shape) == (dtype, shape)
        expected(name, xs, base, parameters).check(result, roundings=12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_any_chunk_size_in_any_compute_dtype(name: str, dtype: torch.dtype) -> None:
    xs, base = tensors(3, (2011,), dtype)
    options: dict[str, Any] = {"parameters": given_to(name, SETTINGS[2]), "compute_dtype": dtype}
    whole = merge(name, xs, base, **options)
    assert torch.isfinite(whole).all()
    for chunk_elements in (1, 7, 64, 1000):
        assert torch.equal(merge(name, xs, base, chunk_elements=chunk_elements, **options), whole)


@pytest.mark.parametrize("name", NAMES)
def test_any_cut_and_any_number_of_threads(name: str) -> None:
    xs, base = tensors(3, (801, 701), torch.bfloat16)
    inputs, parameters = Inputs(), given_to(name, SETTINGS[2])
    loads = tuple(inputs.load(f"m{i}", x) for i, x in enumerate(xs))
    spec = TensorSpec("out", DType.F32, (801, 701))
    tree = Merge(name, spec, loads, inputs.load("base", base), parameters, ({},) * 3, ("",) * 3)
    whole = evaluate(tree, inputs)
    expected(name, xs, base, parameters).check(whole, roundings=12)
    for num_threads, chunk_elements in ((2, 1 << 16), (3, 9973)):
        found = evaluate(tree, inputs, num_threads=num_threads, chunk_elements=chunk_elements)
        assert torch.equal(found.view(torch.int32), whole.view(torch.int32))


def test_in_numbers() -> None:
    base = torch.zeros(5)
    a = torch.tensor([1.0, 4.0, 0.0, 0.01, -0.5])
    b = torch.tensor([0.0, 2.0, 0.0, -0.01, 0.01])
    assert merge("ram", [a, b], base, parameters={"epsilon": 0.01}).tolist() == pytest.approx([1.0, 3.0, 0, 0, -0.5])
    # The first model changes two elements alone and shares one, the second shares one and has none of its own.
    plus = {"epsilon": 0.01, "r": 0.2, "alpha": 1.0}
    assert merge("ramplus_tl", [a, b], base, parameters=plus).tolist() == pytest.approx([1.1, 3.0, 0, 0, -0.55])
    clipped = plus | {"alpha": 0.25}
    assert merge("ramplus_tl", [a, b], base, parameters=clipped).tolist() == pytest.approx([1.05, 3.0, 0, 0, -0.525])


@pytest.mark.parametrize("name", NAMES)
def test_changes_up_to_epsilon_are_none(name: str) -> None:
    base = torch.zeros(3)
    x = torch.tensor([0.25, -0.25, 0.2500001])
    assert merge(name, [x], base, parameters={"epsilon": 0.25}).tolist() == [0.0, 0.0, x[2]]


@pytest.mark.parametrize("name", NAMES)
def test_identical_opposite_and_unchanged_models(name: str) -> None:
    xs, base = tensors(1, (1000,))
    assert torch.equal(merge(name, [base] * 3, base), base)
    assert torch.allclose(merge(name, xs * 3, base), xs[0], rtol=1e-6, atol=1e-6)
    zeros, change = torch.zeros(1000), xs[0]
    assert torch.count_nonzero(merge(name, [change, -change], zeros)) == 0


@pytest.mark.parametrize("name", NAMES)
def test_what_no_model_changes_keeps_its_bits(name: str) -> None:
    base = torch.tensor([-0.0, 1e-45, -3.0])
    assert torch.equal(merge(name, [base, base + 1e-7], base).view(torch.int32), base.view(torch.int32))


def chunk(count: int) -> MemoryChunk:
    xs, base = tensors(count, (70_001,), torch.bfloat16)
    base[::7] = -0.0
    return MemoryChunk(MemoryOperands(xs, base), 0, 70_001)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_by_torch_the_numbers_are_the_same(count: int) -> None:
    assert torch.equal(ram.count_changes_by_torch(chunk(count), 0.5), ram.count_changes(chunk(count), 0.5))
    gains = [1.05, 0.3, -1.0][:count]
    merged, other = ram.merge_(chunk(count), 0.5, gains), ram.merge_by_torch_(chunk(count), 0.5, gains)
    assert torch.equal(merged.view(torch.int32), other.view(torch.int32))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_values(data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 30))
    values = st.lists(st.floats(-10, 10, width=32), min_size=size, max_size=size)
    base, *xs = (torch.tensor(data.draw(values)) for _ in range(data.draw(st.integers(2, 4))))
    name = data.draw(st.sampled_from(NAMES))
    parameters = {
        "epsilon": data.draw(st.floats(0, 5)),
        "r": data.draw(st.floats(-2, 2)),
        "alpha": data.draw(st.floats(0, 3)),
    }
    result = merge(name, xs, base, parameters=given_to(name, parameters))
    expected(name, xs, base, parameters).check(result, roundings=16)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_damaged_inputs_are_named(name: str, bad: float) -> None:
    """They pass through the statistics, whose numbers they spoil, to the check that names the model."""
    xs, base = tensors(1, (30, 20))
    xs[0][7, 3] = bad
    inputs = Inputs()
    loads, spec = (inputs.load("damaged", xs[0]),), TensorSpec("out", DType.F32, (30, 20))
    tree = Merge(name, spec, loads, inputs.load("base", base), {}, ({},), ("key",))
    with pytest.raises(MergeError, match="damaged"):
        evaluate(tree, inputs)


def test_declarations() -> None:
    plain, plus = METHODS.get("ram"), METHODS.get("ramplus_tl")
    assert plain.parameter_names() == {"epsilon": "global"}
    assert plus.parameter_names() == {"epsilon": "global", "r": "global", "alpha": "global"}
    assert plus.global_parameters().model_dump() == {"epsilon": 1e-5, "r": 0.1, "alpha": 0.2}
    assert (plain.access, plus.access) == (Access.ELEMENTWISE, Access.REDUCE)
    for declared in (plain, plus):
        assert (declared.base, declared.min_models) == (BaseUse.REQUIRED, 1)
        assert not declared.propagates_non_finite
        with pytest.raises(ValidationError, match="epsilon"):
            declared.global_parameters(epsilon=-1e-5)
    with pytest.raises(ValidationError, match="alpha"):
        plus.global_parameters(alpha=-0.1)

"""SCE against its formula."""

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
from mergekit_ray.methods import sce
from support.memory_inputs import Inputs, evaluate
from support.operands import MemoryChunk, MemoryOperands, merge
from support.references import trimming
from support.references.merge import Expected

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(), (1,), (0,), (0, 5), (7,), (64, 33), (3, 5, 7)]


def tensors(count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], Any]:
    generator = torch.Generator().manual_seed(7)
    base = torch.randn(shape, generator=generator)
    xs = [(base + 0.5 * (i + 1) * torch.randn(shape, generator=generator)).to(dtype) for i in range(count)]
    return xs, base.to(dtype)


def expected(xs: list[torch.Tensor], base: torch.Tensor, topk: float) -> Expected:
    return trimming.sce(base.double().numpy(), [(x.float() - base.float()).numpy() for x in xs], topk)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_models", [1, 2, 3])
@pytest.mark.parametrize("topk", [0.0, 0.1, 0.7, 1.0])
def test_formula(topk: float, num_models: int, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        xs, base = tensors(num_models, shape, dtype)
        result = merge("sce", xs, base, parameters={"select_topk": topk})
        assert (result.dtype, result.shape) == (dtype, shape)
        expected(xs, base, topk).check(result, roundings=12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("topk", [0.3, 1.0])
def test_any_chunk_size_in_any_compute_dtype(topk: float, dtype: torch.dtype) -> None:
    xs, base = tensors(3, (2011,), dtype)
    options: dict[str, Any] = {"parameters": {"select_topk": topk}, "compute_dtype": dtype}
    whole = merge("sce", xs, base, **options)
    assert torch.isfinite(whole).all()
    for chunk_elements in (1, 7, 64, 1000):
        assert torch.equal(merge("sce", xs, base, chunk_elements=chunk_elements, **options), whole)


def test_any_cut_and_any_number_of_threads() -> None:
    xs, base = tensors(3, (801, 701), torch.bfloat16)
    inputs = Inputs()
    loads = tuple(inputs.load(f"m{i}", x) for i, x in enumerate(xs))
    spec = TensorSpec("out", DType.F32, (801, 701))
    tree = Merge("sce", spec, loads, inputs.load("base", base), {"select_topk": 0.2}, ({},) * 3, ("",) * 3)
    whole = evaluate(tree, inputs)
    for num_threads, chunk_elements in ((2, 1 << 16), (3, 9973)):
        found = evaluate(tree, inputs, num_threads=num_threads, chunk_elements=chunk_elements)
        assert torch.equal(found.view(torch.int32), whole.view(torch.int32))
    # Variances that differ in their last digit are a rounding apart from each other in the selection.
    result = expected(xs, base, 0.2)
    selected = trimming.select([(x.float() - base.float()).numpy() for x in xs], 0.2)
    assert int(((whole != base.float()).numpy() & ~selected).sum()) < 10
    result.is_stable &= (whole != base.float()).numpy() == selected
    result.check(whole, roundings=12)


def change(deltas: list[list[float]], topk: float = 1.0) -> list[float]:
    xs = [torch.tensor(delta, dtype=torch.float64) for delta in deltas]
    base = torch.zeros(len(deltas[0]), dtype=torch.float64)
    merged = merge("sce", xs, base, parameters={"select_topk": topk}, compute_dtype=torch.float64)
    found: list[float] = merged.tolist()
    return found


def test_in_numbers() -> None:
    """Energies 1 + 4 and 1 + 16: weights 5/22 and 17/22. Signs: the first is a tie, so positive."""
    assert change([[1.0, 2.0], [-1.0, 4.0]]) == pytest.approx([1.0, (5 * 2 + 17 * 4) / 22])
    # Selected is the second element alone, of the higher variance: weights 4/20 and 16/20.
    assert change([[1.0, 2.0], [1.5, 4.0]], 0.5) == pytest.approx([0.0, (4 * 2 + 16 * 4) / 20])
    # A share of all elements below 1e-6 is divided by that: 1e-4 comes from a model of weight 1e-8.
    small = change([[1.0, 0.0], [0.0, 1e-4]])[1]
    assert small == pytest.approx(1e-4 * (1e-8 / (1 + 1e-8)) / 1e-6)


def test_exactly_k_of_those_that_vary_and_the_lowest_of_equal_ones() -> None:
    a = torch.zeros(1000)
    a[100:700] = 1.0
    b = -2 * a
    for topk in (0.0, 0.001, 0.25, 0.5, 0.999):
        merged = merge("sce", [a, b], torch.zeros(1000), parameters={"select_topk": topk})
        kept = merged.nonzero().view(-1).tolist()
        assert kept == list(range(100, 100 + math.floor(topk * 600)))


def test_where_models_agree_nothing_varies_and_below_1_nothing_is_selected() -> None:
    (x,), base = tensors(1, (500,))
    for number in (1, 2, 3):
        assert torch.equal(merge("sce", [x] * number, base, parameters={"select_topk": 0.9}), base)
        assert torch.allclose(merge("sce", [x] * number, base), x, rtol=1e-6, atol=1e-6)


def test_models_equal_to_the_base_leave_it_bit_for_bit() -> None:
    _, base = tensors(0, (1000,))
    for topk in (0.5, 1.0):
        assert torch.equal(merge("sce", [base] * 3, base, parameters={"select_topk": topk}), base)


def test_opposite_models_cancel_to_the_positive_one() -> None:
    assert change([[1.0, -3.0], [-1.0, 3.0]]) == pytest.approx([1.0, 3.0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_damaged_inputs_are_named(bad: float) -> None:
    """They pass through the statistics, whose numbers they spoil, to the check that names the model."""
    xs, base = tensors(1, (30, 20))
    xs[0][7, 3] = bad
    inputs = Inputs()
    loads, spec = (inputs.load("damaged", xs[0]),), TensorSpec("out", DType.F32, (30, 20))
    tree = Merge("sce", spec, loads, inputs.load("base", base), {"select_topk": 0.5}, ({},), ("key",))
    with pytest.raises(MergeError, match="damaged"):
        evaluate(tree, inputs)


def chunk(count: int) -> MemoryChunk:
    xs, base = tensors(count, (70_001,), torch.bfloat16)
    return MemoryChunk(MemoryOperands(xs, base), 0, 70_001)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_by_torch_the_numbers_are_the_same(count: int) -> None:
    variances = sce.variances(chunk(count))
    assert torch.equal(sce.variances_by_torch(chunk(count)), variances)
    kept = (variances > 1).to(torch.uint8)
    sums, by_torch = sce.energies(chunk(count), kept), sce.energies_by_torch(chunk(count), kept)
    for one, other in zip(sums, by_torch, strict=True):
        assert float(one.sum()) == pytest.approx(float(other.sum()), rel=1e-13)
    weights = [0.3, 0.7, 1e-9][:count]
    fused, other = sce.fuse_(chunk(count), kept, weights), sce.fuse_by_torch_(chunk(count), kept, weights)
    assert torch.equal(fused.view(torch.int32), other.view(torch.int32))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_values(data: st.DataObject) -> None:
    count, size = data.draw(st.sampled_from([1, 2])), data.draw(st.integers(1, 30))
    # Eighths, whose sums and squares are exact, so that the reference ranks and elects by the same numbers.
    eighths = st.lists(st.integers(-40, 40).map(lambda n: n / 8), min_size=size, max_size=size)
    xs = [torch.tensor(data.draw(eighths)) for _ in range(count)]
    topk = data.draw(st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]))
    base = torch.zeros(size)
    result = expected(xs, base, topk)
    result.is_stable = np.ones(size, dtype=bool)
    result.check(merge("sce", xs, base, parameters={"select_topk": topk}), roundings=12)


def test_declaration() -> None:
    declared = METHODS.get("sce")
    assert declared.parameter_names() == {"select_topk": "global", "int8_mask": "global"}
    assert declared.global_parameters().model_dump() == {"select_topk": 1.0, "int8_mask": False}
    assert (declared.base, declared.access, declared.min_models) == (BaseUse.REQUIRED, Access.REDUCE, 1)
    assert not declared.propagates_non_finite
    for topk in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValidationError, match="select_topk"):
            declared.global_parameters(select_topk=topk)

"""Evaluation against float64, for every way of cutting; and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mergekit_ray.core.declaration import BaseUse
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.expressions import Cast, Expression, Merge, Scale
from mergekit_ray.core.registry import METHODS
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.evaluation.evaluate import Evaluation
from mergekit_ray.evaluation.pool import ComputePool
from mergekit_ray.evaluation.scratch import TORCH_DTYPES
from mergekit_ray.methods.shared.protocol import BLOCK_ELEMENTS, Operands, WholeMethod
from support.memory_inputs import DTYPES, Inputs, evaluate
from support.references.merge import ulp

SHAPE = (701, 211)  # 147,911 elements: no multiple of any block or chunk
CUTS = [(1, 1 << 16), (1, 1000), (2, 4097), (3, 1 << 16), (4, 1 << 20)]


def random(seed: int, dtype: torch.dtype = torch.bfloat16, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def wide(x: torch.Tensor) -> Any:
    return x.to(torch.float64).numpy()


def merge(method: str, inputs: list[Expression], dtype: DType = DType.BF16, **fields: Any) -> Merge:
    spec = TensorSpec("out", dtype, inputs[0].spec.shape)
    given: dict[str, Any] = {"base": None, "parameters": {}, "input_parameters": ({},) * len(inputs)} | fields
    return Merge(method, spec, tuple(inputs), keys=tuple(f"key {i}" for i in range(len(inputs))), **given)


def weighted(inputs: list[Expression], *weights: float, **fields: Any) -> Merge:
    return merge("linear", inputs, input_parameters=tuple({"weight": w} for w in weights), **fields)


def assert_within_an_ulp(actual: torch.Tensor, expected: Any, magnitude: Any) -> None:
    allowed = ulp(expected, actual.dtype) + 8 * 2.0**-24 * magnitude
    assert (np.abs(wide(actual) - expected) <= allowed).all()


def test_a_load_is_the_bytes() -> None:
    inputs, x = Inputs(), random(0)
    assert torch.equal(evaluate(inputs.load("a", x), inputs), x)


@pytest.mark.parametrize("dtypes", list(itertools.permutations([torch.float16, torch.bfloat16, torch.float32], 2)))
def test_cast_is_the_nearest_ties_to_even(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    inputs, x = Inputs(), random(1, dtypes[0])
    found = evaluate(Cast(inputs.load("a", x), DTYPES[dtypes[1]]), inputs)
    assert torch.equal(found, x.to(dtypes[1]))
    assert (np.abs(wide(found) - wide(x)) <= ulp(wide(x), dtypes[1]) / 2).all()


def test_ties_of_a_cast_go_to_even() -> None:
    inputs = Inputs()
    # bfloat16 has 8 significant bits: 1 + 2^-8 lies between 1 and 1 + 2^-7, 1 + 3*2^-8 between that and 1 + 2^-6.
    x = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 1 + 2**-8 + 2**-20])
    found = evaluate(Cast(inputs.load("a", x), DType.BF16), inputs)
    assert found.tolist() == [1.0, 1 + 2**-6, -1.0, 1 + 2**-7]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scale_rounds_once(dtype: torch.dtype) -> None:
    inputs, x = Inputs(), random(2, dtype)
    found = evaluate(Scale(inputs.load("a", x), 0.3, DTYPES[dtype]), inputs)
    assert_within_an_ulp(found, 0.3 * wide(x), 0.3 * abs(wide(x)))


def test_a_cast_below_a_merge_rounds_its_input() -> None:
    inputs, x, y = Inputs(), random(3, torch.float32), random(4, torch.float32)
    tree = weighted([Cast(inputs.load("a", x), DType.BF16), inputs.load("b", y)], 1.0, 1.0, dtype=DType.F32)
    rounded = wide(x.to(torch.bfloat16))
    assert_within_an_ulp(evaluate(tree, inputs), (rounded + wide(y)) / 2, abs(rounded) + abs(wide(y)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_linear_within_an_ulp(dtype: torch.dtype) -> None:
    inputs, xs = Inputs(), [random(i, dtype) for i in range(3)]
    tree = weighted([inputs.load(f"m{i}", x) for i, x in enumerate(xs)], 0.2, 0.3, 0.7, dtype=DTYPES[dtype])
    terms = [w * wide(x) / 1.2 for w, x in zip((0.2, 0.3, 0.7), xs, strict=True)]
    assert_within_an_ulp(evaluate(tree, inputs), sum(terms), sum(abs(t) for t in terms))


def nested(inputs: Inputs) -> tuple[Merge, Any, Any]:
    """task arithmetic over a linear merge, a scaling and a cast; with its float64 value and the terms' magnitude."""
    a, b, c, base = (random(seed, dtype) for seed, dtype in enumerate([torch.bfloat16, torch.float16] * 2))
    average = weighted([inputs.load("a", a), inputs.load("b", b)], 1.0, 3.0, dtype=DType.F32)
    scaled = Scale(inputs.load("c", c), 0.5, DType.F32)
    tree = merge(
        "task_arithmetic",
        [average, scaled],
        base=Cast(inputs.load("base", base), DType.F32),
        input_parameters=({"weight": 0.4}, {"weight": 0.8}),
        parameters={"lambda": 1.5},
    )
    wa, wb, wc, w0 = (wide(x) for x in (a, b, c, base))
    expected = w0 + 1.5 * (0.4 * ((wa + 3 * wb) / 4 - w0) + 0.8 * (wc / 2 - w0))
    return tree, expected, abs(wa) + abs(wb) + abs(wc) + 3 * abs(w0)


def test_nested_merges_round_where_the_tree_says() -> None:
    inputs = Inputs()
    tree, expected, magnitude = nested(inputs)
    assert_within_an_ulp(evaluate(tree, inputs), expected, magnitude)


def trees(inputs: Inputs) -> dict[str, Merge]:
    x, y, z = (inputs.load(m, random(i)) for i, m in enumerate("xyz"))
    trimmed = ({"weight": 0.5, "density": 0.4}, {"weight": 0.9, "density": 0.7})
    slerp = merge("slerp", [x], base=y, parameters={"t": 0.3}, dtype=DType.F32)
    return {
        "linear": weighted([x, y, z], 0.3, 0.3, 0.5),
        "nested": nested(inputs)[0],
        "slerp": slerp,
        "ties": merge("ties", [x, y], base=z, input_parameters=trimmed),
        "dare_linear": merge("dare_linear", [x, y], base=z, input_parameters=trimmed),
        "dare_ties, not rescaled": merge(
            "dare_ties", [x, y], base=z, input_parameters=trimmed, parameters={"rescale": False}
        ),
        "ties over slerp": merge("ties", [slerp, y], base=z, input_parameters=trimmed),
    }


@pytest.mark.parametrize("name", list(trees(Inputs())))
def test_every_way_of_cutting_gives_the_same_bits(name: str) -> None:
    inputs = Inputs()
    tree = trees(inputs)[name]
    first = evaluate(tree, inputs)
    for num_threads, chunk_elements in CUTS:
        again = evaluate(tree, inputs, num_threads=num_threads, chunk_elements=chunk_elements)
        assert torch.equal(again, first), (num_threads, chunk_elements)


@pytest.mark.parametrize("name", ["linear", "nested", "dare_ties, not rescaled"])
@pytest.mark.parametrize("window", [1 << 16, 2 << 16])
def test_windows_of_elementwise_trees_give_the_same_bits(name: str, window: int) -> None:
    inputs = Inputs()
    tree = trees(inputs)[name]
    assert torch.equal(evaluate(tree, inputs, window=window, num_threads=2), evaluate(tree, inputs))


@pytest.mark.parametrize("shape", [(), (1,), (3, 0), (1, 1, 1)])
def test_small_shapes(shape: tuple[int, ...]) -> None:
    inputs = Inputs()
    x, y = random(0, torch.float32, shape), random(1, torch.float32, shape)
    tree = weighted([inputs.load("a", x), inputs.load("b", y)], 0.5, 0.5, dtype=DType.F32)
    assert_within_an_ulp(evaluate(tree, inputs), (wide(x) + wide(y)) / 2, abs(wide(x)) + abs(wide(y)))


WITH_BASE = ["task_arithmetic", "ties", "dare_linear", "dare_ties", "slerp"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("method", "position"), [("linear", "input"), *itertools.product(WITH_BASE, ["input", "base"])]
)
def test_a_bad_input_is_named_by_model_tensor_and_index(bad: float, method: str, position: str) -> None:
    shape = (70_000,)
    x, y, z = (random(i, shape=shape) for i in range(3))
    (x if position == "input" else z)[69_000] = bad
    inputs = Inputs()
    loads = [inputs.load("m1", x, "layer.w")] + ([] if method == "slerp" else [inputs.load("m2", y)])
    # No weight and no density lets a bad value pass unseen.
    parameters = {} if method == "slerp" else {"weight": 0.0}
    if method.startswith(("dare", "ties")):
        parameters["density"] = 0.01
    tree = merge(
        method,
        list(loads),
        base=None if method == "linear" else inputs.load("m9", z, "layer.w"),
        input_parameters=(parameters,) + ({"weight": 0.5},) * (len(loads) - 1),
        parameters={"t": 0.5} if method == "slerp" else {},
    )
    guilty = "m1" if position == "input" else "m9"
    with pytest.raises(MergeError) as caught:
        evaluate(tree, inputs, references={guilty: "org/damaged"})
    assert caught.value.where == "model org/damaged, tensor 'layer.w'"
    assert f"{bad} in the input, first at flat index 69000 (1 such value read)" in caught.value.what
    assert "`options=MergeOptions(allow_non_finite=True)`" in str(caught.value)


def test_a_bad_input_in_a_later_window_has_its_index_in_the_whole_tensor() -> None:
    x = random(0, shape=(200_000,))
    x[150_123] = float("nan")
    inputs = Inputs()
    tree = weighted([inputs.load("m0", x)], 1.0)
    with pytest.raises(MergeError, match="first at flat index 150123 "):
        evaluate(tree, inputs, window=1 << 16)


def test_a_bad_input_deep_in_a_tree_is_named() -> None:
    x, y = random(0, shape=(10,)), random(1, shape=(10,))
    x[4] = float("inf")
    inputs = Inputs()
    inner = merge("ties", [inputs.load("m1", x)], base=inputs.load("m2", y), input_parameters=({"weight": 0.0},))
    with pytest.raises(MergeError, match="inf in the input, first at flat index 4 ") as caught:
        evaluate(Scale(Cast(weighted([inner], 1.0), DType.F32), 2.0, DType.F32), inputs)
    assert caught.value.where == "model m1, tensor 'w'"


@pytest.mark.parametrize("kind", ["cast", "scale", "merge", "nested"])
def test_overflow_of_the_result_is_told_apart(kind: str) -> None:
    inputs = Inputs()
    x = inputs.load("m1", torch.full((100,), 70_000.0))
    tree = {
        "cast": Cast(x, DType.F16),
        "scale": Scale(x, 2.0, DType.F16),
        "merge": weighted([x], 1.0, dtype=DType.F16),
        "nested": weighted([weighted([x], 1.0, dtype=DType.F16)], 1.0, dtype=DType.F32),
    }[kind]
    with pytest.raises(MergeError, match=r"overflow float(16|32) .* though all inputs are finite"):
        evaluate(tree, inputs)
    allowed = evaluate(tree, inputs, allow_non_finite=True)
    assert torch.isinf(allowed).all()


@pytest.mark.parametrize(
    ("dtype", "largest", "unit"), [(DType.F16, 65504.0, 2.0**4), (DType.BF16, (2 - 2.0**-7) * 2.0**127, 2.0**119)]
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_overflow_begins_half_a_unit_above_the_largest_number(
    dtype: DType, largest: float, unit: float, sign: float
) -> None:
    inputs = Inputs()
    below = torch.tensor([sign * (largest + unit)]).nextafter(torch.tensor([0.0]))
    found = evaluate(Scale(inputs.load("m1", below), 1.0, dtype), inputs)
    assert found.double().item() == sign * largest
    at = torch.tensor([sign * (largest + unit)])
    with pytest.raises(MergeError, match="overflow"):
        evaluate(Scale(inputs.load("m1", at), 1.0, dtype), inputs)


def test_allowed_values_pass_through() -> None:
    inputs, x = Inputs(), random(0, shape=(10,))
    x[3], x[5] = float("nan"), float("inf")
    found = evaluate(weighted([inputs.load("m1", x)], 1.0), inputs, allow_non_finite=True)
    assert torch.isnan(found[3])
    found[3] = x[3] = 0.0
    assert torch.equal(found, x)


def test_finite_values_whose_sum_overflows_are_fine() -> None:
    inputs = Inputs()
    x = torch.full((1000,), torch.finfo(torch.float32).max)
    found = evaluate(Scale(inputs.load("m1", x), 1.0, DType.F32), inputs)
    assert torch.equal(found, x)


@pytest.fixture
def row_sums() -> Iterator[str]:
    """A method that must see whole tensors: ``base + Σ x_i``, each row's elements replaced by their sum."""

    class RowSums(WholeMethod):
        name = "row_sums_for_tests"
        base = BaseUse.OPTIONAL

        def combine_whole(
            self, inputs: Sequence[torch.Tensor], base: torch.Tensor | None, operands: Operands
        ) -> torch.Tensor:
            assert all(x.shape == operands.shape and x.dtype == operands.compute_dtype for x in inputs)
            total = torch.stack(list(inputs)).sum(0).sum(-1, keepdim=True)
            return total.expand(operands.shape) + (0 if base is None else base)

    METHODS.names()
    METHODS.register(RowSums.name)(RowSums)
    yield RowSums.name
    del METHODS._entries[RowSums.name]


def test_whole_methods_see_tensors_in_their_shape(row_sums: str) -> None:
    inputs, xs = Inputs(), [torch.randint(-8, 8, (300, 400)).to(torch.bfloat16) for _ in range(3)]
    x, y, base = (inputs.load(f"m{i}", x) for i, x in enumerate(xs))
    tree = merge(row_sums, [x, weighted([y], 1.0)], base=base, dtype=DType.F32)
    expected = (xs[0].double() + xs[1].double()).sum(-1, keepdim=True) + xs[2].double()
    for num_threads, chunk_elements in CUTS:
        found = evaluate(tree, inputs, num_threads=num_threads, chunk_elements=chunk_elements)
        assert torch.equal(found.double(), expected)  # small integers: exact
    above = weighted([tree], 2.0, parameters={"normalize": False}, dtype=DType.F32)
    assert torch.equal(evaluate(above, inputs).double(), 2 * expected)


def test_errors_of_a_method_keep_their_words() -> None:
    inputs = Inputs()
    tree = weighted([inputs.load("a", random(0)), inputs.load("b", random(1))], 1.0, -1.0)
    with pytest.raises(MergeError, match="sum to 0"):
        evaluate(tree, inputs)


def test_scratch_does_not_grow_with_the_tensor() -> None:
    def buffers_after(num_elements: int) -> dict[torch.dtype, int]:
        inputs = Inputs()
        xs = [random(i, shape=(num_elements,)) for i in range(3)]
        loads = [inputs.load(f"m{i}", x) for i, x in enumerate(xs)]
        trimmed = ({"weight": 0.5, "density": 0.4},) * 2
        tree = merge("dare_ties", [*loads[:2]], base=loads[2], input_parameters=trimmed)
        pool = ComputePool(1)
        out = torch.empty(num_elements, dtype=torch.bfloat16)
        Evaluation(tree, inputs.pieces(tree), pool, chunk_elements=1 << 16).fill(0, num_elements, out)
        assert not any(pool.scratch.mark().values()), "everything taken was released"
        return pool.scratch.held_elements

    assert buffers_after(8 * BLOCK_ELEMENTS) == buffers_after(2 * BLOCK_ELEMENTS)


def test_scratch_is_released_after_an_error() -> None:
    inputs, pool = Inputs(), ComputePool(1)
    x = random(0, shape=(10,))
    x[0] = float("nan")
    tree = weighted([inputs.load("m0", x)], 1.0)
    evaluation = Evaluation(tree, inputs.pieces(tree), pool)
    with pytest.raises(MergeError):
        evaluation.fill(0, 10, torch.empty(10, dtype=torch.bfloat16))
    assert not any(pool.scratch.mark().values())


@pytest.mark.parametrize(("num_threads", "num_items"), [(1, 5), (2, 5), (4, 3), (3, 0), (3, 1)])
def test_runs_cover_all_items_in_order(num_threads: int, num_items: int) -> None:
    pool = ComputePool(num_threads)
    runs = pool.map_runs(num_items, lambda first, last: list(range(first, last)))
    pool.close()
    assert [i for run in runs for i in run] == list(range(num_items))
    assert min(num_threads, num_items) <= len(runs) <= (num_items if num_threads > 1 else 1)


def test_every_dtype_of_the_format_has_its_torch_dtype() -> None:
    assert {dtype: theirs.itemsize for dtype, theirs in TORCH_DTYPES.items()} == {d: d.itemsize for d in DType}


def test_what_a_method_refuses_names_the_tensor() -> None:
    inputs = Inputs()
    loads: list[Expression] = [inputs.load(name, random(seed)) for seed, name in enumerate("ab")]
    with pytest.raises(MergeError, match="sum to 0") as caught:
        evaluate(weighted(loads, 1.0, -1.0), inputs)
    assert caught.value.where == "tensor 'out'"

"""Sums computed from bytes to bytes give what the evaluator gives, bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.expressions import Cast, Constant, Expression, Literal, Merge, Noise
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.evaluation.compiled import compiled
from mergekit_ray.evaluation.pool import ComputePool
from mergekit_ray.evaluation.scratch import TORCH_DTYPES
from mergekit_ray.methods.shared.accumulate import divisor, single_divisor
from support.memory_inputs import Inputs, evaluate

DTYPES_16_AND_32 = [torch.bfloat16, torch.float32]


def linear(
    inputs: Inputs, tensors: Sequence[torch.Tensor], weights: Sequence[float], dtype: DType, *, normalize: bool = True
) -> Merge:
    loads = tuple(inputs.load(f"m{i}", x) for i, x in enumerate(tensors))
    return Merge(
        "linear",
        TensorSpec("w", dtype, loads[0].spec.shape),
        loads,
        base=None,
        parameters={"normalize": normalize},
        input_parameters=tuple({"weight": weight} for weight in weights),
        keys=tuple(load.model for load in loads),
    )


def filled(
    expression: Expression, inputs: Inputs, *, start: int = 0, stop: int | None = None, num_threads: int = 1
) -> tuple[torch.Tensor, bool]:
    how = compiled(expression)
    assert how is not None
    stop = expression.spec.num_elements if stop is None else stop
    out = np.empty((stop - start) * expression.spec.dtype.itemsize, np.uint8)
    pieces = inputs.pieces(expression, start, stop)
    data = {load: (piece.data.view(torch.uint8).numpy(), piece.start) for load, piece in pieces.items()}
    pool = ComputePool(num_threads)
    try:
        fill = how.begin(data, pool)
        is_finite = fill is not None and fill(start, out)
    finally:
        pool.close()
    return torch.from_numpy(out).view(TORCH_DTYPES[expression.spec.dtype]), is_finite


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("kind", DTYPES_16_AND_32)
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32])
@pytest.mark.parametrize("weights", [[1.0], [0.3, 0.7], [1.0, -2.5, 1e-3], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]])
@pytest.mark.parametrize("normalize", [True, False])
def test_bits_are_the_evaluators(kind: torch.dtype, dtype: DType, weights: list[float], normalize: bool) -> None:
    generator = torch.Generator().manual_seed(len(weights))
    tensors = [torch.randn(301_007, generator=generator).to(kind) for _ in weights]
    inputs = Inputs()
    expression = linear(inputs, tensors, weights, dtype, normalize=normalize)
    expected = evaluate(expression, inputs)
    for num_threads in (1, 3):
        found, is_finite = filled(expression, inputs, num_threads=num_threads)
        assert is_finite
        assert torch.equal(bits(found), bits(expected))
    window, _ = filled(expression, inputs, start=1001, stop=200_000)
    assert torch.equal(bits(window), bits(expected[1001:200_000]))


BASED: dict[str, tuple[dict[str, Any], list[dict[str, Any]], bool]] = {
    "task_arithmetic": ({"lambda": 0.8}, [{"weight": 0.3}, {"weight": 0.7}, {"weight": -0.2}], True),
    "task_arithmetic, normalised": ({"normalize": True}, [{"weight": 0.3}, {"weight": 0.6}], True),
    "slerp": ({"t": 0.3}, [{}], True),
    "slerp, farther": ({"t": 0.7}, [{}], True),
    "slerp, beyond": ({"t": -0.6}, [{}], True),
    "nuslerp": ({}, [{"weight": 0.3}, {"weight": 0.7}], False),
    "nuslerp, of changes": ({}, [{"weight": 0.3}, {"weight": 0.7}], True),
    "multislerp": ({}, [{"weight": 0.3}, {"weight": 0.7}, {"weight": 0.5}], False),
    "multislerp, of changes": ({}, [{"weight": 0.3}, {"weight": 0.7}, {"weight": 0.5}], True),
    "multislerp, of one": ({}, [{"weight": 0.3}], True),
    "karcher": ({}, [{}, {}, {}], False),
    "model_stock": ({}, [{}, {}, {}], True),
    "dare_linear": ({"lambda": 0.8}, [{"weight": 0.3, "density": 0.5}, {"weight": -0.7, "density": 0.1}], True),
    "dare_linear, as it is kept": ({"rescale": False}, [{"weight": 0.3, "density": 0.5}] * 2, True),
    "dare_linear, normalised": (
        {"normalize": True},
        [{"weight": 0.3, "density": density} for density in (0.0, 0.5, 1.0)],
        True,
    ),
    "dare_ties": (
        {"lambda": 0.8},
        [{"weight": w, "density": d} for w, d in ((0.3, 0.5), (-0.7, 0.1), (0.2, 1.0))],
        True,
    ),
    "dare_ties, as it is kept": ({"rescale": False}, [{"weight": 0.3, "density": 0.5}] * 3, True),
    "dare_ties, normalised": (
        {"normalize": True},
        [{"weight": w, "density": d} for w, d in ((0.3, 0.5), (-0.3, 0.9), (0.3, 1.0), (0.4, 0.0), (0.2, 1e-12))],
        True,
    ),
    "nearswap": ({"t": 1e-3}, [{}], True),
    "nearswap, wide": ({"t": 0.5}, [{}], True),
}


@pytest.mark.parametrize("distance", [1.0, 1e-3])
@pytest.mark.parametrize("kind", DTYPES_16_AND_32)
@pytest.mark.parametrize("name", BASED)
def test_bits_of_methods(name: str, kind: torch.dtype, distance: float) -> None:
    """Of models that have little in common, and of such that are nearly the same."""
    parameters, input_parameters, has_base = BASED[name]
    generator = torch.Generator().manual_seed(len(name))
    base = torch.randn(517, 613, generator=generator)
    tensors = [base + distance * torch.randn(517, 613, generator=generator) for _ in input_parameters]
    inputs = Inputs()
    loads = tuple(inputs.load(f"m{i}", x.to(kind)) for i, x in enumerate(tensors))
    for dtype in (DType.BF16, DType.F32):
        expression = Merge(
            name.partition(",")[0],
            TensorSpec("w", dtype, (517, 613)),
            loads,
            base=inputs.load("base", base.to(kind)) if has_base else None,
            parameters=parameters,
            input_parameters=tuple(input_parameters),
            keys=tuple(load.model for load in loads),
        )
        expected = evaluate(expression, inputs)
        for num_threads in (1, 3):
            found, is_finite = filled(expression, inputs, num_threads=num_threads)
            assert is_finite
            assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("kind", DTYPES_16_AND_32)
@pytest.mark.parametrize("name", ["dare_linear, as it is kept", "dare_ties, as it is kept"])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (1001, 70_000), (65_535, 131_073), (131_072, 200_000)])
def test_masks_are_the_same_in_every_window(name: str, kind: torch.dtype, start: int, stop: int) -> None:
    parameters, input_parameters, _ = BASED[name]
    inputs = Inputs()
    base, *loads = (inputs.load(f"m{i}", torch.randn(200_000).to(kind)) for i in range(1 + len(input_parameters)))
    expression = Merge(
        name.partition(",")[0],
        TensorSpec("w", DType.F32, (200_000,)),
        tuple(loads),
        base=base,
        parameters=parameters,
        input_parameters=tuple(input_parameters),
        keys=tuple(load.model for load in loads),
    )
    found, is_finite = filled(expression, inputs, start=start, stop=stop, num_threads=2)
    assert is_finite
    assert torch.equal(bits(found), bits(evaluate(expression, inputs)[start:stop]))


@pytest.mark.parametrize("kind", DTYPES_16_AND_32)
def test_numbers_at_odd_addresses_are_left_to_the_evaluator(kind: torch.dtype) -> None:
    inputs = Inputs()
    expression = linear(inputs, [torch.ones(1000, dtype=kind), torch.ones(1000, dtype=kind)], [1.0, 2.0], DType.BF16)
    how = compiled(expression)
    assert how is not None
    for offset in (0, 1):
        data = {}
        for load, piece in inputs.pieces(expression).items():
            room = np.empty(piece.data.numel() * kind.itemsize + 8, np.uint8)
            bytes_ = room[offset : room.size - 8 + offset]
            bytes_[:] = piece.data.view(torch.uint8).numpy()
            data[load] = (bytes_, 0)
        assert (how.begin(data, ComputePool(1)) is None) == (offset != 0)


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32])
def test_zeros_keep_their_signs(dtype: DType) -> None:
    values = torch.tensor([0.0, -0.0, 0.5, -0.5, 1.0, -1.0] * 8)
    for x, base in itertools.product(itertools.permutations(range(6)), [values, values.flip(0)]):
        inputs = Inputs()
        kind = TORCH_DTYPES[dtype]
        loads = inputs.load("x", values[list(x) * 8].to(kind)), inputs.load("base", base.to(kind))
        expression = Merge(
            "nearswap",
            TensorSpec("w", dtype, (48,)),
            loads[:1],
            base=loads[1],
            parameters={"t": 0.5},
            input_parameters=({},),
            keys=("x",),
        )
        assert torch.equal(bits(filled(expression, inputs)[0]), bits(evaluate(expression, inputs)))


@pytest.mark.parametrize("name", ["nuslerp", "model_stock"])
def test_vectors_within_a_tensor_are_for_the_evaluator(name: str) -> None:
    inputs = Inputs()
    base, *loads = (inputs.load(f"m{i}", torch.randn(8, 8)) for i in range(3))
    expression = Merge(
        name,
        TensorSpec("w", DType.F32, (8, 8)),
        tuple(loads),
        base=base,
        parameters={"nuslerp": {"nuslerp_flatten": False}, "model_stock": {"filter_wise": True}}[name],
        input_parameters={"nuslerp": ({"weight": 1.0},) * 2, "model_stock": ({},) * 2}[name],
        keys=("a", "b"),
    )
    assert filled(expression, inputs)[1] is False


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32])
@pytest.mark.parametrize("place", [17, 999])
def test_what_is_not_finite_is_for_the_evaluator(dtype: DType, place: int) -> None:
    for name, (parameters, input_parameters, has_base) in BASED.items():
        for damaged in range(len(input_parameters) + has_base):
            inputs = Inputs()
            kind = TORCH_DTYPES[dtype]
            tensors = [torch.randn(1000).to(kind) for _ in range(len(input_parameters) + has_base)]
            tensors[damaged][place] = torch.inf
            loads = [inputs.load(f"m{i}", x) for i, x in enumerate(tensors)]
            expression = Merge(
                name.partition(",")[0],
                TensorSpec("w", dtype, (1000,)),
                tuple(loads[: len(input_parameters)]),
                base=loads[-1] if has_base else None,
                parameters=parameters,
                input_parameters=tuple(input_parameters),
                keys=tuple("abcde"[: len(input_parameters)]),
            )
            assert filled(expression, inputs)[1] is False


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_bits_of_any_numbers(data: st.DataObject) -> None:
    """Of numbers next to nothing and next to overflow, too; what is not finite is seen."""
    kind = data.draw(st.sampled_from(DTYPES_16_AND_32))
    dtype = data.draw(st.sampled_from([DType.BF16, DType.F32]))
    codes = st.integers(0, (1 << 8 * kind.itemsize) - 1)
    length = data.draw(st.integers(1, 40))
    integers = {2: torch.int16, 4: torch.int32}[kind.itemsize]
    sign = 1 << (8 * kind.itemsize - 1)
    tensors = []
    for _ in range(data.draw(st.integers(1, 3))):
        drawn = data.draw(st.lists(codes, min_size=length, max_size=length))
        tensors.append(torch.tensor([c - 2 * sign if c >= sign else c for c in drawn], dtype=integers).view(kind))
    weights = [data.draw(st.floats(-2, 2, width=32)) for _ in tensors]
    inputs = Inputs()
    expression = linear(inputs, tensors, weights, dtype, normalize=False)
    found, is_finite = filled(expression, inputs)
    try:
        expected = evaluate(expression, inputs)
    except MergeError:
        assert not is_finite
    else:
        assert is_finite
        assert torch.equal(bits(found), bits(expected))


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32])
@pytest.mark.parametrize("distribution", ["normal", "uniform"])
@pytest.mark.parametrize("value", [0.0, -1.7])
def test_noise_around_a_constant(dtype: DType, distribution: str, value: float) -> None:
    around = Constant(TensorSpec("r", DType.F32, (7, 14_001)), value)
    for scale in (0.0, 0.02, 1.0):
        expression = Noise(around, distribution, scale, "key", dtype)
        expected = evaluate(expression, Inputs())
        found, is_finite = filled(expression, Inputs())
        assert is_finite
        assert torch.equal(bits(found), bits(expected))
        window, _ = filled(expression, Inputs(), start=1001, stop=90_000)
        assert torch.equal(bits(window), bits(expected)[1001 * dtype.itemsize : 90_000 * dtype.itemsize])


@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32])
def test_values_of_the_plan(dtype: DType) -> None:
    values = np.random.default_rng(0).standard_normal(70_000).astype("<f4")
    expression = Literal.of(TensorSpec("r", dtype, (70, 1000)), values.tobytes())
    found, is_finite = filled(expression, Inputs())
    assert is_finite
    assert torch.equal(bits(found), bits(evaluate(expression, Inputs())))
    values[69_000] = 3.4e38  # beyond bfloat16
    expression = Literal.of(TensorSpec("r", dtype, (70, 1000)), values.tobytes())
    assert filled(expression, Inputs())[1] is (dtype is DType.F32)
    values[0] = np.nan
    assert not filled(Literal.of(TensorSpec("r", dtype, (70, 1000)), values.tobytes()), Inputs())[1]


def test_what_it_is_not_for() -> None:
    inputs = Inputs()
    x = torch.ones(4, dtype=torch.bfloat16)
    expression = linear(inputs, [x, x], [1.0, 1.0], DType.BF16)
    assert compiled(expression) is not None
    assert compiled(linear(inputs, [x.to(torch.float8_e4m3fn), x], [1.0, 1.0], DType.BF16)) is None
    assert compiled(Cast(expression, DType.F32)) is None
    assert compiled(inputs.load("m", x)) is None
    assert compiled(dataclasses.replace(expression, method="geometric_median", parameters={})) is None
    assert compiled(dataclasses.replace(expression, compute_dtype=DType.BF16)) is None
    assert compiled(Noise(x=inputs.load("m", x), distribution="normal", scale=1.0, key="k", dtype=DType.BF16)) is None
    zero = Constant(TensorSpec("r", DType.F32, (2, 2)), 0.0)
    assert compiled(Noise(zero, "normal", 1.0, "k", DType.F16)) is None
    assert compiled(Noise(zero, "normal", 1.0, "k", DType.F32, DType.F64)) is None
    inner = dataclasses.replace(expression, inputs=(expression, *expression.inputs[1:]))
    assert compiled(inner) is None
    cancelling = linear(inputs, [x, x], [1.0, -1.0], DType.BF16)
    assert filled(cancelling, inputs)[1] is False
    with pytest.raises(MergeError, match="sum to 0") as caught:
        evaluate(cancelling, inputs)
    assert caught.value.where == "tensor 'w'"


@given(st.lists(st.floats(-10, 10, allow_subnormal=False), min_size=1, max_size=12))
def test_weights_are_added_as_torch_adds_them(weights: list[float]) -> None:
    try:
        expected = divisor(weights, torch.float32, normalize=True)
    except MergeError:
        with pytest.raises(MergeError):
            single_divisor(weights)
    else:
        assert single_divisor(weights) == expected

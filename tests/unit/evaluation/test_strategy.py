"""How tensors are computed, decided before anything is read."""

from __future__ import annotations

import pytest
import torch

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Cast, Constant, Expression, Merge, Noise
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.evaluation.strategy import Strategy, choose
from support.device_cases import MethodCase, weighted
from support.memory_inputs import Inputs

TWO = weighted(0.5, 0.5)


def linear(dtype: torch.dtype = torch.bfloat16, out: DType | None = None) -> Merge:
    return MethodCase("linear", weights=TWO, has_base=False).tree(Inputs(), dtype, out)


def dare(dtype: torch.dtype) -> Merge:
    return MethodCase("dare_linear", weights=weighted(0.5, 0.5, density=0.5)).tree(Inputs(), dtype)


def of(method: str, **more: float) -> Merge:
    return MethodCase(method, weights=weighted(0.5, 0.5, **more)).tree(Inputs())


def cast_first() -> Merge:
    tree = linear()
    inputs = tuple(Cast(x, DType.F32) for x in tree.inputs)
    return Merge("linear", tree.spec, inputs, None, {}, tree.input_parameters, tree.keys)


NOISE = Noise(Constant(TensorSpec("gate", DType.F32, (4, 4)), 0.0), "normal", 0.1, "key", DType.F32)


@pytest.mark.parametrize(
    ("expression", "strategy", "why"),
    [
        (Inputs().load("a", torch.zeros(3)), Strategy.COPY, "bytes are the result"),
        (linear(), Strategy.COMPILED, "from the bytes read"),
        (linear(torch.float32, DType.BF16), Strategy.COMPILED, "from the bytes read"),
        (NOISE, Strategy.COMPILED, "from the bytes read"),
        (linear(torch.float16, DType.F64), Strategy.COMPILED, "from the bytes read"),
        (linear(torch.float8_e4m3fn, DType.BF16), Strategy.TORCH, "16 bits and more, and one tensor is float8_e4m3fn"),
        (dare(torch.float16), Strategy.TORCH, "dare_linear take bfloat16 and float32, and one tensor is float16"),
        (cast_first(), Strategy.TORCH, "one input is computed first"),
        (of("ties", density=0.5), Strategy.TORCH, "ties has no compiled loop"),
        (Cast(Inputs().load("a", torch.zeros(3)), DType.BF16), Strategy.TORCH, "no compiled loops for cast"),
    ],
)
def test_on_the_cpu(expression: Expression, strategy: Strategy, why: str) -> None:
    choice = choose(expression, "cpu")
    assert choice.strategy is strategy
    assert why in choice.why
    assert (choice.compiled is not None) == (strategy is Strategy.COMPILED)


def test_what_may_be_infinite_is_left_to_torch() -> None:
    assert choose(linear(), "cpu", allow_non_finite=True).strategy is Strategy.TORCH


def test_on_a_device() -> None:
    assert choose(linear(), "cuda:0").strategy is Strategy.DEVICE
    assert choose(Inputs().load("a", torch.zeros(3)), "cuda:0").strategy is Strategy.COPY


def test_a_method_whose_choices_depend_on_the_processor_stays_on_the_cpu() -> None:
    tree = MethodCase("arcee_fusion", {}, ({},)).tree(Inputs())
    for expression in (tree, Cast(tree, DType.F32)):
        choice = choose(expression, "cuda:0")
        assert choice.strategy is Strategy.TORCH
        assert "arcee_fusion" in choice.why

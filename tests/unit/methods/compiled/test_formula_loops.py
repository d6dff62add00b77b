"""Loops made of formulas: each step is rounded as IEEE 754 has it, on every processor."""

from __future__ import annotations

import itertools
import math
import platform
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, cast

import numpy as np
import pytest
import torch

from mergekit_ray.core.dtypes import DType
from mergekit_ray.evaluation.scratch import TORCH_DTYPES
from mergekit_ray.methods.compiled import formula_loops, native
from mergekit_ray.methods.compiled.formula_loops import WIDTH, loop
from mergekit_ray.methods.shared.numbers import INPUT, Number, fma, formula_of, maximum, minimum
from support.memory_inputs import DTYPES

KINDS = [DType.F16, DType.BF16, DType.F32, DType.F64]

X, Y, Z = (Number(INPUT, index=i) for i in range(3))
SIZES = (0, 1, WIDTH - 1, WIDTH, WIDTH + 1, 3 * WIDTH + 5)
BASELINE = {"x86_64": "x86-64"}.get(platform.machine(), "generic")


def computed(
    result: Number, inputs: Sequence[torch.Tensor], out: DType, *, sees_inputs: bool = False
) -> tuple[torch.Tensor, bool]:
    formula, scalars = formula_of(result)
    run = loop(formula, [DTYPES[x.dtype] for x in inputs], out, sees_inputs=sees_inputs)
    found = torch.zeros(inputs[0].numel(), dtype=TORCH_DTYPES[out])
    addresses = np.array([x.data_ptr() for x in inputs], np.int64)
    is_finite = run(addresses, np.array(scalars, np.float32), found.data_ptr(), found.numel())
    return found, is_finite


def bits(x: torch.Tensor) -> list[int]:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
    return cast("list[int]", x.view(integers).tolist())


def every_16_bit_number(kind: DType) -> torch.Tensor:
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(TORCH_DTYPES[kind])


def rounded(exact: Fraction) -> np.float32:
    """To nearest and to even, in one step."""
    near = np.float32(float(exact))
    around = (np.nextafter(near, np.float32(-math.inf)), near, np.nextafter(near, np.float32(math.inf)))
    return min(around, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1))


def numbers(count: int, seed: int, kind: DType = DType.F32) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(count) * 10.0 ** generator.integers(-3, 3, count)
    return torch.from_numpy(values).to(TORCH_DTYPES[kind])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (X + Y, lambda x, y, z: x + y),
        (X - Y, lambda x, y, z: x - y),
        (X * Y, lambda x, y, z: x * y),
        (X / Y, lambda x, y, z: x / y),
        (X * 0.1, lambda x, y, z: x * np.float32(0.1)),
        (X * Y + Z, lambda x, y, z: x * y + z),
        (minimum(X, Y), lambda x, y, z: np.where(x < y, x, y)),
        (maximum(X, Y), lambda x, y, z: np.where(x > y, x, y)),
    ],
    ids=["sum", "difference", "product", "quotient", "scaled", "two roundings", "minimum", "maximum"],
)
def test_each_operation(result: Number, expected: Callable[..., Any], size: int) -> None:
    x, y, z = (numbers(size, seed) for seed in range(3))
    found, is_finite = computed(result, [x, y, z], DType.F32)
    assert is_finite
    reference = expected(x.numpy(), y.numpy(), z.numpy())
    assert reference.dtype == np.float32
    assert bits(found) == bits(torch.from_numpy(reference))


def test_a_fused_product_is_rounded_once() -> None:
    x, y, z = (numbers(500, seed) for seed in range(3))
    z[:250] = -x[:250] * y[:250]  # of which little is left, all of it lost by a product that is rounded
    found, _ = computed(fma(X, Y, Z), [x, y, z], DType.F32)
    exact = [Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)) for a, b, c in zip(x, y, z, strict=True)]
    assert bits(found) == bits(torch.from_numpy(np.array([rounded(number) for number in exact])))


def test_zeros_keep_their_signs() -> None:
    x, y = torch.tensor([0.0, -0.0, 0.0, -0.0]), torch.tensor([-0.0, 0.0, 0.0, -0.0])
    assert bits(computed(minimum(X, Y), [x, y], DType.F32)[0]) == bits(y)
    assert bits(computed(maximum(X, Y), [x, y], DType.F32)[0]) == bits(y)


@pytest.mark.parametrize("kind", [DType.F16, DType.BF16])
def test_every_16_bit_number_is_read(kind: DType) -> None:
    every = every_16_bit_number(kind)
    finite = every[every.isfinite()]
    found, is_finite = computed(X, [finite], DType.F32, sees_inputs=True)
    assert is_finite
    assert bits(found) == bits(finite.to(torch.float32))
    for value in every[~every.isfinite()]:
        assert not computed(X, [value.expand(3).contiguous()], DType.F32, sees_inputs=True)[1]


@pytest.mark.parametrize("kind", [DType.F16, DType.BF16])
def test_results_are_rounded_to_nearest_and_to_even(kind: DType) -> None:
    """Every number of the dtype, all that lies half way between two, and what is next to that on both sides."""
    every = every_16_bit_number(kind)[1 << 15 :]
    finite = every[every.isfinite()].to(torch.float32)
    ties = ((finite[1:].double() + finite[:-1].double()) / 2).to(torch.float32)
    beside = [torch.nextafter(ties, torch.tensor(limit)) for limit in (-math.inf, math.inf)]
    values = torch.cat([finite, ties, *beside])
    values = torch.cat([values, -values])
    found, is_finite = computed(X, [values], kind)
    assert is_finite
    assert bits(found) == bits(values.to(TORCH_DTYPES[kind]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [0, WIDTH - 1, WIDTH, 3 * WIDTH + 4])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_noticed(kind: DType, place: int, value: float) -> None:
    x = numbers(3 * WIDTH + 5, 0, kind)
    spoiled = x.clone()
    spoiled[place] = value
    for sees_inputs in (False, True):
        assert computed(X + Y, [x, x], kind, sees_inputs=sees_inputs)[1]
        assert not computed(X + Y, [x, spoiled], kind, sees_inputs=sees_inputs)[1]
    hidden = minimum(maximum(Y, X), X)  # X, whatever Y is
    assert computed(hidden, [x, spoiled], kind)[1]
    assert not computed(hidden, [x, spoiled], kind, sees_inputs=True)[1]


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16])
def test_what_is_rounded_to_an_infinity_is_noticed(dtype: DType) -> None:
    largest = torch.finfo(TORCH_DTYPES[dtype]).max
    tie = torch.tensor((largest + 2.0 ** math.frexp(largest)[1]) / 2)
    for sign in (1, -1):
        assert computed(X, [(sign * torch.nextafter(tie, torch.tensor(0.0))).expand(5).contiguous()], dtype)[1]
        assert not computed(X, [(sign * tie).expand(5).contiguous()], dtype)[1]


def test_a_double_beyond_float32_is_noticed() -> None:
    assert not computed(X, [torch.full((5,), 1e39, dtype=torch.float64)], DType.F64)[1]


def test_the_bits_do_not_depend_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made for the one at hand, and for the oldest of its kind, which has neither wide vectors nor fused products."""
    result = minimum(maximum(fma(X - Z, 0.3, fma(Y - Z, 0.7, Z)) / 1.7, Z - 0.5), Z + 0.5)
    for mix in itertools.product(KINDS, repeat=3):
        inputs = [numbers(3 * WIDTH + 5, seed, dtype) for seed, dtype in enumerate(mix)]
        for out in KINDS:
            for module in (formula_loops, native):
                monkeypatch.setattr(module, "processor", lambda: (BASELINE, ""))
            limited, _ = computed(result, inputs, out)
            monkeypatch.undo()
            assert bits(computed(result, inputs, out)[0]) == bits(limited)


def test_formulas_that_differ_in_scalars_share_a_loop() -> None:
    first, scalars = formula_of(fma(X, 0.1, Y) / 3.0)
    second, others = formula_of(fma(X, 0.2, Y) / 4.0)
    assert first == second
    assert (scalars, others) == ([0.1, 3.0], [0.2, 4.0])


def test_what_is_used_twice_is_computed_once() -> None:
    difference = X - Y
    formula, _ = formula_of(difference * difference)
    assert formula.steps == ((INPUT, 0), (INPUT, 1), ("fsub", 0, 1), ("fmul", 2, 2))

"""Rounding against exact rational arithmetic."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch

from mergekit_ray.evaluation.rounding import fits, is_finite, round_into
from mergekit_ray.evaluation.scratch import ThreadScratch

# Significant bits, exponent of the smallest normal number.
FORMATS = {torch.bfloat16: (8, -126), torch.float16: (11, -14)}


def nearest(value: float, dtype: torch.dtype) -> float:
    """Round half to even in exact arithmetic."""
    bits, lowest = FORMATS[dtype]
    if value == 0:
        return value
    exponent = max(math.frexp(value)[1] - 1, lowest)
    unit = Fraction(2) ** (exponent - bits + 1)
    return float(round(Fraction(value) / unit) * unit)  # Fraction rounds half to even


def rounded(values: list[float], dtype: torch.dtype) -> list[float]:
    out = torch.empty(len(values), dtype=dtype)
    round_into(torch.tensor(values, dtype=torch.float64), out, ThreadScratch())
    return out.double().tolist()


@pytest.mark.parametrize("dtype", FORMATS)
def test_float64_is_rounded_once(dtype: torch.dtype) -> None:
    bits, _ = FORMATS[dtype]
    drawn = random.Random(0)
    values = [drawn.gauss(0, 1) * 2.0 ** drawn.randint(-20, 10) for _ in range(2000)]
    # Close to ties, on either side, nearer than float32 can see.
    ties = [(1 + (2 * drawn.randrange(2**bits) + 1) * 2.0**-bits / 2) * 2.0 ** drawn.randint(-8, 8) for _ in range(500)]
    values += [sign * tie * (1 + nudge) for tie in ties for sign in (1, -1) for nudge in (0, 2.0**-40, -(2.0**-40))]
    values += [0.0, -0.0, 1e-60, -1e-60, 2.0**-26, 1.5 * 2.0**-25, 1 + 2.0**-8 + 2.0**-40]
    assert rounded(values, dtype) == [nearest(value, dtype) for value in values]


def test_signs_of_zero_and_non_finite_values_survive() -> None:
    found = rounded([-0.0, math.inf, -math.inf, math.nan, 1e300], torch.bfloat16)
    assert math.copysign(1, found[0]) == -1
    assert found[1:3] == [math.inf, -math.inf]
    assert math.isnan(found[3])
    assert found[4] == math.inf


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", FORMATS)
def test_fits_is_exactly_whether_the_rounded_values_are_finite(dtype: torch.dtype, wide: torch.dtype) -> None:
    bits, _ = FORMATS[dtype]
    largest = torch.finfo(dtype).max
    edge = torch.tensor(largest * (1 + 1 / (2 ** (bits + 1) - 2)), dtype=wide)  # half a unit above the largest
    for value in (edge, edge.nextafter(edge * 2), edge.nextafter(edge * 0), edge * 0, edge / edge):
        for x in (value, -value):
            out = torch.empty(1, dtype=dtype)
            round_into(x.reshape(1), out, ThreadScratch())
            assert fits(x.reshape(1), dtype) == bool(torch.isfinite(out).all()), x
    assert not fits(torch.tensor([1.0, math.nan], dtype=wide), dtype)
    assert fits(torch.tensor([largest], dtype=wide), wide)
    assert not fits(torch.tensor([math.inf], dtype=wide), wide)


def test_is_finite() -> None:
    assert is_finite(torch.full((10,), torch.finfo(torch.float32).max))
    assert is_finite(torch.empty(0))
    assert not is_finite(torch.tensor([math.inf, -math.inf]))
    assert not is_finite(torch.tensor([1.0, math.nan], dtype=torch.float16))

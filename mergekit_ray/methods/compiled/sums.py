"""Sums and inner products of 16- and 32-bit numbers as they lie in files, a run at a time, without torch.

Numbers are given by their bits, since numpy has no bfloat16: float32 as uint32, bfloat16 as uint16, its upper half. The
operations and their order are those of `mergekit_ray.methods.accumulate`, bit for bit: products are added fused, as
torch does it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_ray.methods.compiled.intrinsics import float32_of, fma, uint32_of
from mergekit_ray.methods.compiled.jit import compiled

Bits = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]
Floats = np.ndarray[Any, np.dtype[np.float32]]

_EXPONENT = np.uint32(0x7F800000)
_UPPER_EXPONENT = np.uint32(0x7F80)
_HALF = np.uint32(0x7FFF)
_ONE = np.uint32(1)
_SIXTEEN = np.uint32(16)

_LANES = 64
"""Independent partial sums: enough for a loop of its own, which the processor runs in parallel. Part of the result: the
same everywhere."""


@compiled
def scaled(x: Bits, shift: np.uint32, factor: np.float32, total: Floats) -> None:
    """``total = factor * x``; ``shift`` is 16 for bfloat16, 0 for float32."""
    for i in range(x.size):
        total[i] = float32_of(np.uint32(np.uint32(x[i]) << shift)) * factor


@compiled
def add_scaled(x: Bits, shift: np.uint32, factor: np.float32, total: Floats) -> None:
    """``total += factor * x``."""
    for i in range(x.size):
        total[i] = fma(float32_of(np.uint32(np.uint32(x[i]) << shift)), factor, total[i])


@compiled
def add_rounded(x: Bits, shift: np.uint32, factor: np.float32, total: Floats) -> None:
    """``total += factor * x``, the product rounded before it is added."""
    for i in range(x.size):
        total[i] += float32_of(np.uint32(np.uint32(x[i]) << shift)) * factor


@compiled
def difference(x: Bits, shift: np.uint32, base: Floats, out: Floats) -> None:
    """``out = x - base``."""
    for i in range(x.size):
        out[i] = float32_of(np.uint32(np.uint32(x[i]) << shift)) - base[i]


@compiled
def add(total: Floats, x: Floats) -> None:
    """``total += x``."""
    for i in range(total.size):
        total[i] += x[i]


@compiled
def multiply(total: Floats, factor: np.float32) -> None:
    """``total *= factor``."""
    for i in range(total.size):
        total[i] *= factor


@compiled
def interpolate(a: Floats, b: Floats, t: np.float32, total: Floats) -> None:
    """``a + t (b - a)``, from the nearer end, as ``torch.lerp`` has it."""
    if abs(t) < np.float32(0.5):
        for i in range(a.size):
            total[i] = fma(t, b[i] - a[i], a[i])
    else:
        back = np.float32(t - np.float32(1.0))
        for i in range(a.size):
            total[i] = fma(back, b[i] - a[i], b[i])


@compiled
def hold(x: Floats, base: Floats, t: np.float32, out: Floats) -> None:
    """``x`` held within ``base ± t``; where both are zero, the bound."""
    for i in range(x.size):
        low, high = base[i] - t, base[i] + t
        least = max(low, x[i])
        out[i] = min(high, least)


@compiled
def all_finite(x: Bits, shift: np.uint32) -> bool:
    """Whether no number is a NaN or an infinity."""
    spoiled = np.uint32(0)
    for i in range(x.size):
        spoiled |= np.uint32((np.uint32(np.uint32(x[i]) << shift) & _EXPONENT) == _EXPONENT)
    return bool(spoiled == 0)


@compiled
def dot(x: Floats, y: Floats) -> float:
    """``Σ x_i y_i`` in float64, where products of float32 numbers are exact."""
    lanes = np.zeros(_LANES)
    even = x.size // _LANES * _LANES
    for start in range(0, even, _LANES):
        for lane in range(_LANES):
            lanes[lane] += np.float64(x[start + lane]) * np.float64(y[start + lane])
    for i in range(even, x.size):
        lanes[0] += np.float64(x[i]) * np.float64(y[i])
    return float(lanes.sum())


@compiled
def divide(total: Floats, divisor: np.float32) -> None:
    """``total /= divisor``."""
    for i in range(total.size):
        total[i] /= divisor


@compiled
def rounded(total: Floats, out: Bits) -> bool:
    """``total`` rounded to bfloat16, to nearest and to even; whether it and the result are all finite."""
    spoiled = np.uint32(0)
    for i in range(total.size):
        bits = uint32_of(total[i])
        upper = (bits + _HALF + ((bits >> _SIXTEEN) & _ONE)) >> _SIXTEEN
        spoiled |= np.uint32((upper & _UPPER_EXPONENT) == _UPPER_EXPONENT)
        spoiled |= np.uint32((bits & _EXPONENT) == _EXPONENT)
        out[i] = upper
    return bool(spoiled == 0)


@compiled
def copied(total: Floats, out: Bits) -> bool:
    """The bits of ``total``; whether all of it is finite."""
    spoiled = np.uint32(0)
    for i in range(total.size):
        bits = uint32_of(total[i])
        spoiled |= np.uint32((bits & _EXPONENT) == _EXPONENT)
        out[i] = bits
    return bool(spoiled == 0)

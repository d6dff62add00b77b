"""The merge formulas in float64 numpy, written plainly: whole arrays, sorts, no shared code with the package."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Array = np.ndarray[Any, np.dtype[Any]]

MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}
LOWEST_EXPONENT = {torch.bfloat16: -126, torch.float16: -14, torch.float32: -126, torch.float64: -1022}


SMALLEST_NORMAL = 2.0**-126
"""Of float32. Numbers below it are rounded as coarsely as it is, before they are divided by the sum of the weights."""


def ulp(x: Array, dtype: torch.dtype) -> Array:
    """Distance between neighbours of ``dtype`` at ``|x|``."""
    exponents = np.frexp(np.abs(x))[1] - 1
    exponents = np.where(x == 0, LOWEST_EXPONENT[dtype], np.maximum(exponents, LOWEST_EXPONENT[dtype]))
    return np.ldexp(1.0, exponents - MANTISSA_BITS[dtype])


@dataclass
class Expected:
    """What a formula gives.

    Attributes:
        value: in float64.
        magnitude: sum of the magnitudes of the terms that were added: rounding is relative to this.
        is_stable: elements whose sign election does not hang on the last digits.
    """

    value: Array
    magnitude: Array
    is_stable: Array

    def check(self, actual: torch.Tensor, *, roundings: int, unit: float = 2.0**-24) -> None:
        """At most 1 ulp of the output, and ``roundings`` of the arithmetic's own where terms cancel."""
        got = actual.to(torch.float64).numpy()
        allowed = ulp(self.value, actual.dtype) + roundings * unit * self.magnitude
        wrong = self.is_stable & ~(np.abs(got - self.value) <= allowed)
        assert not wrong.any(), (
            f"{wrong.sum()} of {wrong.size} wrong, first: {got[wrong][0]!r}, not {self.value[wrong][0]!r}"
            f" within {allowed[wrong][0]!r}"
        )


def linear(xs: Sequence[Array], weights: Sequence[float], *, normalize: bool) -> Expected:
    divisor = math.fsum(weights) if normalize else 1.0
    value = sum(w * x for w, x in zip(weights, xs, strict=True)) / divisor
    magnitude = (sum(abs(w * x) for w, x in zip(weights, xs, strict=True)) + SMALLEST_NORMAL) / abs(divisor)
    return Expected(value, magnitude, np.ones_like(value, dtype=bool))


def slerp(base: Array, x: Array, t: float) -> Expected:
    flat_base, flat_x = base.reshape(-1), x.reshape(-1)
    norms = [math.sqrt(math.fsum(v * v)) for v in (flat_base, flat_x)]
    units = [v / (norm if norm > 1e-8 else 1.0) for v, norm in zip((flat_base, flat_x), norms, strict=True)]
    cosine = math.fsum(units[0] * units[1])
    if abs(cosine) > 0.9995:
        factors = 1 - t, t
    else:
        theta = math.acos(cosine)
        factors = math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)
    value = factors[0] * base + factors[1] * x
    magnitude = abs(factors[0] * base) + abs(factors[1] * x) + abs(base) + abs(x)
    return Expected(value, magnitude, np.ones_like(value, dtype=bool))


def added_to_base(
    base: Array, deltas: Sequence[Array], weights: Sequence[float], *, normalize: bool, scale: float
) -> Expected:
    """``b + λ Σ w_i δ_i``, over ``Σ w_i`` if normalised."""
    divisor = math.fsum(weights) if normalize else 1.0
    change = sum(w * d for w, d in zip(weights, deltas, strict=True)) * scale / divisor
    changes = sum(abs(w * d) for w, d in zip(weights, deltas, strict=True)) + SMALLEST_NORMAL
    magnitude = abs(base) + changes * abs(scale / divisor)
    return Expected(base + change, magnitude, np.ones_like(base, dtype=bool))


def elected(
    base: Array, deltas: Sequence[Array], weights: Sequence[float], *, normalize: bool, scale: float
) -> Expected:
    """``b + λ Σ m_i d_i``, over ``Σ m_i w_i`` if normalised, ``d_i = w_i δ̃_i``."""
    weighted = [w * d for w, d in zip(weights, deltas, strict=True)]
    total = sum(weighted)
    spread = sum(abs(d) for d in weighted)
    sign = np.where(total >= 0, 1.0, -1.0)
    masks = [np.sign(d) == sign for d in weighted]
    merged = sum(np.where(m, d, 0.0) for m, d in zip(masks, weighted, strict=True))
    if normalize:
        divisor = sum(np.where(m, w, 0.0) for m, w in zip(masks, weights, strict=True))
        divisor = np.where(np.abs(divisor) < 1e-12, 1.0, divisor)
        merged = merged / divisor
        spread_of_change = spread / np.abs(divisor)
        lost = sum(abs(w) for w in weights) / np.abs(divisor)
    else:
        spread_of_change, lost = spread, np.ones_like(base)
    # An exact tie is decided (positive), but only weights without rounding make one.
    is_exact = all(math.frexp(w)[0] in {0.5, -0.5, 0.0} for w in weights)
    is_stable = (np.abs(total) > 1e-5 * spread) | ((total == 0) & is_exact) | (spread == 0)
    magnitude = abs(base) + abs(scale) * spread_of_change * lost
    return Expected(base + scale * merged, magnitude, is_stable)


def keep_largest(magnitudes: Array, density: float) -> Array:
    """Mask of the ``⌊density·n⌋`` largest, by a stable sort: of equal ones the lowest index."""
    flat = magnitudes.reshape(-1)
    mask = np.zeros(flat.shape, dtype=bool)
    mask[np.argsort(-flat, kind="stable")[: math.floor(density * flat.size)]] = True
    return mask.reshape(magnitudes.shape)


def rescaled(delta: Array, mask: Array, *, rescale: bool) -> Array:
    trimmed = np.where(mask, delta, 0.0)
    whole, kept = (math.fsum(np.abs(v).reshape(-1)) for v in (delta, trimmed))
    return trimmed * (whole / kept) if rescale and whole >= 1e-7 and kept >= 1e-7 else trimmed


def hash_word(key: str, index: int) -> int:
    """The 32-bit word of one element, in Python integers."""
    block, offset = divmod(index, 1 << 16)
    x = offset
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    x ^= x >> 16
    digest = hashlib.sha256(hashlib.sha256(key.encode()).digest() + block.to_bytes(8, "little")).digest()
    x = (x + int.from_bytes(digest[:4], "little")) % 2**32
    x ^= x >> 16
    x = (x * 0x7FEB352D + int.from_bytes(digest[4:8], "little")) % 2**32
    x ^= x >> 15
    return x * 0x846CA68B % 2**32


def keep_random(key: str, shape: tuple[int, ...], density: float) -> Array:
    size = math.prod(shape)
    words = np.array([(hash_word(key, index) + 2**31) % 2**32 for index in range(size)], dtype=np.uint64)
    return (words < math.floor(density * 2**32)).reshape(shape)

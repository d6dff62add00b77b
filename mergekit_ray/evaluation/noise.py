"""Random numbers that are a function of a key and an index, on the CPU and without torch.

Noise is drawn by counting, as random masks are: element ``i`` of the stream ``key`` is a function of the 32-bit word
``w`` that `methods.shared.random_mask` defines. Uniform numbers are ``(2w + 1) / 2^32``, ``w`` read as a signed number:
odd multiples of 2^-32 between -1 and 1. Normal ones are the quantile of the standard normal at ``(that + 1) / 2``
(M. J. Wichura 1988, "Algorithm AS 241: The Percentage Points of the Normal Distribution", PPND16: to about 1 part in
10^16), which reach ±6.34 standard deviations. Everything is done in float64 by additions, multiplications, divisions
and square roots, the logarithm too: these are rounded alike on every processor, so the noise is the same everywhere
(`evaluation.nodes.generated` has the same for devices). torch would not do on CPUs: its square roots there are not all
rounded right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from mergekit_ray.methods.shared.random_mask import HASH_BLOCK, block_keys, mixed_offsets

Doubles = np.ndarray[Any, np.dtype[np.float64]]
Words = np.ndarray[Any, np.dtype[np.uint32]]

RUN_ELEMENTS: Final = 1 << 15
"""Numbers drawn at a time: the float64 intermediates of that many stay in cache."""

# PPND16: numerators and denominators, highest power first; the central region, and the tails beyond 0.425.
CENTRE: Final = 0.425
CENTRE_ABOVE: Final = (
    2509.0809287301226727,
    33430.575583588128105,
    67265.770927008700853,
    45921.953931549871457,
    13731.693765509461125,
    1971.5909503065514427,
    133.14166789178437745,
    3.3871328727963666080,
)
CENTRE_BELOW: Final = (
    5226.4952788528545610,
    28729.085735721942674,
    39307.895800092710610,
    21213.794301586595867,
    5394.1960214247511077,
    687.18700749205790830,
    42.313330701600911252,
    1.0,
)
TAIL_ABOVE: Final = (
    7.74545014278341407640e-4,
    2.27238449892691845833e-2,
    2.41780725177450611770e-1,
    1.27045825245236838258,
    3.64784832476320460504,
    5.76949722146069140550,
    4.63033784615654529590,
    1.42343711074968357734,
)
TAIL_BELOW: Final = (
    1.05075007164441684324e-9,
    5.47593808499534494600e-4,
    1.51986665636164571966e-2,
    1.48103976427480074590e-1,
    6.89767334985100004550e-1,
    1.67638483018380384940,
    2.05319162663775882187,
    1.0,
)
LOG_SERIES: Final = tuple(2.0 / (2 * k + 1) for k in range(11, -1, -1))
"""2 artanh(s) / s in powers of s²: beyond float64's precision for \\|s\\| <= 0.172."""


def words(key: str, start: int, count: int) -> Words:
    """Elements ``[start, start + count)`` of a stream: `methods.shared.random_mask.hash_words`, by numpy.

    Routers are too small to wait for a compiler's import, whose loop `hash_words` takes on CPUs.
    """
    first = start // HASH_BLOCK
    num_blocks = -(-(start + count) // HASH_BLOCK) - first
    found = np.empty(count, np.uint32)
    for block, (a, b) in enumerate(block_keys(key, first, num_blocks), first):
        low, high = max(start, block * HASH_BLOCK), min(start + count, (block + 1) * HASH_BLOCK)
        offset = low - block * HASH_BLOCK
        x = mixed_offsets()[offset : offset + high - low] + a
        x ^= x >> 16
        x *= np.uint32(0x7FEB352D)
        x += b
        x ^= x >> 15
        np.multiply(x, np.uint32(0x846CA68B), out=found[low - start : high - start])
    return found


def uniform_numbers(key: str, start: int, count: int) -> Doubles:
    """Numbers uniform in (-1, 1): elements ``[start, start + count)`` of the stream ``key``."""
    numbers = words(key, start, count).view(np.int32).astype(np.float64)
    numbers *= 2.0
    numbers += 1.0
    numbers *= 2.0**-32
    return numbers


def normal_numbers(key: str, start: int, count: int) -> Doubles:
    """Standard normal numbers: elements ``[start, start + count)`` of the stream ``key``."""
    q = uniform_numbers(key, start, count)
    q *= 0.5
    r = CENTRE**2 - q * q
    result = _polynomial(CENTRE_ABOVE, r)
    result *= q
    result /= _polynomial(CENTRE_BELOW, r)
    tails = np.flatnonzero(np.abs(q) > CENTRE)
    if tails.size:
        result[tails] = _tails(q[tails])
    return result


DRAW: Final[dict[str, Callable[[str, int, int], Doubles]]] = {"normal": normal_numbers, "uniform": uniform_numbers}
"""By the name of a distribution."""


def _tails(q: Doubles) -> Doubles:
    """The quantiles of ``q + 1/2`` that lie beyond the central region."""
    r = np.sqrt(-_log(0.5 - np.abs(q)))
    r -= 1.6
    return np.copysign(_polynomial(TAIL_ABOVE, r) / _polynomial(TAIL_BELOW, r), q)


def _polynomial(coefficients: Sequence[float], x: Doubles) -> Doubles:
    """Horner's rule in single steps: a fused multiply-add would round otherwise."""
    result = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result *= x
        result += coefficient
    return result


def _log(x: Doubles) -> Doubles:
    """Natural logarithm of positive normal numbers, by exactly rounded operations only."""
    bits = x.view(np.int64)
    exponent = (bits >> 52) - 1023
    mantissa = ((bits & ((1 << 52) - 1)) | (1023 << 52)).view(np.float64)  # in [1, 2)
    large = mantissa > math.sqrt(2.0)
    mantissa = np.where(large, mantissa * 0.5, mantissa)
    exponent += large
    s = (mantissa - 1.0) / (mantissa + 1.0)
    series = _polynomial(LOG_SERIES, s * s)
    series *= s
    series += exponent * math.log(2.0)
    return series

"""Divergences of the softmax of rows, in float64 whatever the rows are in.

Exponential and logarithm are of additions, products and one division, so that a loop over a row is vectorised, and
rounds alike on every processor.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from mergekit_ray.methods.compiled.intrinsics import float64_of, fma, int64_of
from mergekit_ray.methods.compiled.jit import compiled

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
Doubles = np.ndarray[Any, np.dtype[np.float64]]

_LANES: Final = 64
"""Independent partial sums: enough for a loop of its own. Part of the result: the same everywhere."""

_MANTISSA_BITS: Final = np.int64(52)
_EXPONENT: Final = np.int64(0x7FF0000000000000)
_MAGNITUDE: Final = np.int64(0x7FFFFFFFFFFFFFFF)
_SIGN_SHIFT: Final = np.int64(63)
_HALF_AN_OCTAVE: Final = np.int64(1 << 51)

_LOWEST: Final = -700.0
"""Exponents below, of 1e-304 and less, count as this one."""
_ROUNDER: Final = 1.5 * 2.0**52
"""Added to a number below 2^51 and subtracted, it rounds it to an integer, which the sum's low bits are, too."""
_LOG2_E: Final = 1.0 / math.log(2.0)
_LN_2: Final = math.log(2.0)
_LN_2_HIGH: Final = float.fromhex("0x1.62e42fefa3800p-1")
"""The first 42 bits of ln 2."""
_LN_2_LOW: Final = float.fromhex("0x1.ef35793c76730p-45")
"""The rest."""
_EXP: Final = tuple(1.0 / math.factorial(power) for power in range(14))
"""Taylor's coefficients of the exponential: up to ±(ln 2)/2 the rest is below 1e-17."""
_ATANH: Final = tuple(1.0 / (2 * index + 3) for index in range(12))
"""Those of ``(artanh s − s) / s³``, by powers of ``s²``: up to ±0.2 the rest is below 1e-17 of ``s``."""


@compiled
def of_rows(x: Floats, base: Floats, length: int, smallest: float, found: Doubles) -> None:
    """``Σ p ln(p/q) − (p − q)`` of each row, with ``p`` and ``q`` the softmax of ``x`` and ``base`` plus ``smallest``.

    Each term is never negative, and together they are ``Σ p ln(p/q)``, whose terms cancel.

    Args:
        x: rows, one after the other, 1-D.
        base: as many.
        length: of a row; positive.
        smallest: positive, and normal.
        found: filled with one number per row; NaN where a row is not finite.
    """
    p, q = np.empty(length), np.empty(length)
    for row in range(found.size):
        start, stop = row * length, (row + 1) * length
        p_scale = 1.0 / _exponentials(x[start:stop], p)
        q_scale = 1.0 / _exponentials(base[start:stop], q)
        for i in range(length):
            p[i] = _term(fma(p[i], p_scale, smallest), fma(q[i], q_scale, smallest))
        found[row] = _sum(p) if math.isfinite(p_scale + q_scale) else math.nan


@compiled
def _exponentials(row: Floats, out: Doubles) -> float:
    """``exp`` of each element less the largest; returns their sum, NaN if one is not finite."""
    largest, spoiled = np.int64(-(1 << 63)), False
    for i in range(row.size):
        bits = int64_of(np.float64(row[i]))
        spoiled |= (bits & _EXPONENT) == _EXPONENT
        largest = max(largest, bits ^ ((bits >> _SIGN_SHIFT) & _MAGNITUDE))  # ordered as the numbers are
    if spoiled:
        return math.nan
    top = float64_of(largest ^ ((largest >> _SIGN_SHIFT) & _MAGNITUDE))
    for i in range(row.size):
        out[i] = _exp(np.float64(row[i]) - top)
    return _sum(out)


@compiled
def _exp(x: float) -> float:
    """``exp`` of a number that is not positive, to an ulp."""
    x = max(x, _LOWEST)
    shifted = fma(x, _LOG2_E, _ROUNDER)
    octaves = shifted - _ROUNDER
    rest = fma(octaves, -_LN_2_LOW, fma(octaves, -_LN_2_HIGH, x))
    power = _polynomial(_EXP, rest)
    return float(float64_of(int64_of(power) + (int64_of(shifted) << _MANTISSA_BITS)))


@compiled
def _term(p: float, q: float) -> float:
    """``p ln(p/q) − (p − q)`` of positive, normal numbers.

    ``ln(p/q)`` is ``k ln 2 + 2 artanh s`` with ``s = (p' − q)/(p' + q)``, ``p' = p/2^k`` the nearest to ``q`` or
    next to it. For ``k = 0``, the usual case, ``2 p s − (p − q)`` is ``s (p − q)``, where nothing cancels.
    """
    octaves = (int64_of(p) - int64_of(q) + _HALF_AN_OCTAVE) >> _MANTISSA_BITS
    near = float64_of(int64_of(p) - (octaves << _MANTISSA_BITS))
    s = (near - q) / (near + q)
    square = s * s
    tail = _polynomial(_ATANH, square)
    change = p - q
    whole = s * change if octaves == 0 else fma(p, fma(np.float64(octaves), _LN_2, 2.0 * s), -change)
    return float(fma(2.0 * p, tail * square * s, whole))


@compiled
def _polynomial(coefficients: tuple[float, ...], x: float) -> float:
    """``Σ c_k x^k``, by Horner's rule."""
    total = coefficients[len(coefficients) - 1]
    for power in range(len(coefficients) - 2, -1, -1):
        total = fma(total, x, coefficients[power])
    return total


@compiled
def _sum(values: Doubles) -> float:
    lanes = np.zeros(_LANES)
    for start in range(0, values.size, _LANES):
        run = values[start : start + _LANES]
        for lane in range(run.size):
            lanes[lane] += run[lane]
    return float(lanes.sum())


@compiled
def importance(x: Floats, base: Floats, start: int, length: int, factors: Floats, out: Floats) -> None:
    """``|x − base|`` times the factor of the row, all of one dtype.

    Args:
        x: a run of rows' elements.
        base: as many.
        start: flat index of the first.
        length: of a row.
        factors: one per row.
        out: as many as ``x``; may be ``x`` or ``base``.
    """
    place = 0
    while place < x.size:
        row, column = divmod(start + place, length)
        stop, factor = min(x.size, place + length - column), factors[row]
        run, run_base, run_out = x[place:stop], base[place:stop], out[place:stop]
        for i in range(run.size):
            run_out[i] = abs(run[i] - run_base[i]) * factor
        place = stop


@compiled
def take_important(x: Floats, base: Floats, weighed: Floats, threshold: float) -> None:
    """Of ``x`` what is at least as important as ``threshold``, of ``base`` the rest, in place of ``x``.

    If an importance is not a number, the result is not either.

    Args:
        x: 1-D.
        base: as many.
        weighed: `importance` of each.
        threshold: of the dtype of ``x``.
    """
    limit = x.dtype.type(threshold)
    for i in range(x.size):
        otherwise = weighed[i] if np.isnan(weighed[i]) else base[i]
        x[i] = x[i] if weighed[i] >= limit else otherwise

"""Sign election (see `mergekit_ray.methods.sign`) over a run of elements, in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_ray.methods.compiled.jit import compiled

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]

_BLOCK = 1024
"""Elements at a time, whose sums stay in the first-level cache."""


@compiled
def _elect(signs: Floats, terms: tuple[Floats, ...], factors: Floats, start: int) -> None:
    """+1 where ``Σ factor_i · term_i`` is zero or more, −1 elsewhere."""
    one, zero = signs.dtype.type(1), signs.dtype.type(0)
    signs[:] = zero
    for model in range(len(terms)):
        term, factor = terms[model][start : start + signs.size], factors[model]
        for i in range(signs.size):
            signs[i] += term[i] * factor
    for i in range(signs.size):
        signs[i] = one if signs[i] >= zero else -one


@compiled
def add_elected(
    base: Floats,
    terms: tuple[Floats, ...],
    factors: Floats,
    weights: Floats,
    scale: float,
    zero_divisor: float,
) -> None:
    """``base += scale · merged``, with ``d_i = factor_i · term_i``.

    Args:
        base: 1-D run, changed in place.
        terms: one run per model; not changed.
        factors: one per model.
        weights: what is summed where a model agrees, to divide by.
        scale: λ, in the dtype of ``base``.
        zero_divisor: sums of weights up to this magnitude count as zero, and are not divided by; infinity divides
            nowhere.
    """
    one, zero = base.dtype.type(1), base.dtype.type(0)
    all_signs, all_merged = np.empty(_BLOCK, base.dtype), np.empty(_BLOCK, base.dtype)
    all_divisors = np.empty(_BLOCK, base.dtype)
    for start in range(0, base.size, _BLOCK):
        run = base[start : start + _BLOCK]
        signs, merged, divisors = all_signs[: run.size], all_merged[: run.size], all_divisors[: run.size]
        _elect(signs, terms, factors, start)
        merged[:] = zero
        divisors[:] = zero
        for model in range(len(terms)):
            term, factor, weight = terms[model][start : start + run.size], factors[model], weights[model]
            for i in range(run.size):
                # Times the elected sign, what agrees is positive. What is not a number is added, so that it shows.
                agreeing = term[i] * factor * signs[i]
                merged[i] += max(agreeing, zero)
                divisors[i] += weight if agreeing > zero else zero
        for i in range(run.size):
            divisor = divisors[i] if abs(divisors[i]) > zero_divisor else one
            run[i] += scale * (merged[i] / divisor) * signs[i]

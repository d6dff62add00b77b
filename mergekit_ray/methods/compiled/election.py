"""Sign election (see `mergekit_ray.methods.shared.sign`) over a run of elements, in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_ray.methods.compiled.jit import compiled

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]

Terms = tuple[Floats, ...] | Floats
"""One run per model, or the rows of a matrix."""

Number = float | np.floating[Any]

BLOCK = 1024
"""Elements at a time, whose sums stay in the first-level cache."""


@compiled
def _elect(signs: Floats, terms: Terms, factors: Floats, start: int) -> None:
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
    terms: Terms,
    factors: Floats,
    weights: Floats,
    scale: Number,
    zero_divisor: Number,
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
    space = np.empty((3, BLOCK), base.dtype)
    for start in range(0, base.size, BLOCK):
        add_elected_block(base[start : start + BLOCK], terms, start, factors, weights, scale, zero_divisor, space)


@compiled
def add_elected_block(
    run: Floats,
    terms: Terms,
    start: int,
    factors: Floats,
    weights: Floats,
    scale: Number,
    zero_divisor: Number,
    space: Floats,
) -> None:
    """`add_elected` of at most `BLOCK` elements.

    Args:
        run: of the base, changed in place.
        terms: longer runs.
        start: where in them the elements lie.
        factors: see `add_elected`.
        weights: see `add_elected`.
        scale: see `add_elected`.
        zero_divisor: see `add_elected`.
        space: working memory, ``[3, BLOCK]``.
    """
    one, zero = run.dtype.type(1), run.dtype.type(0)
    # Times the elected sign, what agrees is positive. What is not a number is added, so that it shows.
    signs, merged, divisors = space[0, : run.size], space[1, : run.size], space[2, : run.size]
    _elect(signs, terms, factors, start)
    merged[:] = zero
    if zero_divisor == np.inf:
        for model in range(len(terms)):
            term, factor = terms[model][start : start + run.size], factors[model]
            for i in range(run.size):
                merged[i] += max(term[i] * factor * signs[i], zero)
        for i in range(run.size):
            run[i] += scale * merged[i] * signs[i]
        return
    divisors[:] = zero
    for model in range(len(terms)):
        term, factor, weight = terms[model][start : start + run.size], factors[model], weights[model]
        for i in range(run.size):
            agreeing = term[i] * factor * signs[i]
            merged[i] += max(agreeing, zero)
            divisors[i] += weight if agreeing > zero else zero
    for i in range(run.size):
        divisor = divisors[i] if abs(divisors[i]) > zero_divisor else one
        run[i] += scale * (merged[i] / divisor) * signs[i]

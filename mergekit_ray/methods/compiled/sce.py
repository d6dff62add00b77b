"""Loops of `mergekit_ray.methods.sce`: each is one pass over a run of elements."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_ray.methods.compiled.jit import compiled

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
Flags = np.ndarray[Any, np.dtype[np.uint8]]

_BLOCK = 1024
"""Elements at a time, whose sums stay in the first-level cache."""
_LANES = 256
"""Independent partial sums: enough for a loop of its own. Part of the result: the same everywhere."""


@compiled
def variance(out: Floats, base: Floats, inputs: tuple[Floats, ...]) -> None:
    """The number of models times the variance of their task vectors, of each element.

    Args:
        out: filled.
        base: 1-D run.
        inputs: one run per model.
    """
    zero, number = out.dtype.type(0), out.dtype.type(len(inputs))
    all_totals = np.empty(_BLOCK, out.dtype)
    for start in range(0, out.size, _BLOCK):
        squares, run, first = out[start : start + _BLOCK], base[start : start + _BLOCK], inputs[0][start:]
        totals = all_totals[: squares.size]
        squares[:] = zero
        totals[:] = zero
        for model in range(1, len(inputs)):
            x = inputs[model][start : start + squares.size]
            for i in range(squares.size):
                # From the first model, so that equal task vectors have a variance of exactly 0.
                e = (x[i] - run[i]) - (first[i] - run[i])
                totals[i] += e
                squares[i] += e * e
        for i in range(squares.size):
            squares[i] -= totals[i] * totals[i] / number


@compiled
def energies(base: Floats, inputs: tuple[Floats, ...], kept: Flags) -> Floats:
    """``Σ δ²`` of each model over what is kept, in float64."""
    sums = np.zeros((len(inputs), _LANES))
    for start in range(0, base.size, _LANES):
        run, run_kept = base[start : start + _LANES], kept[start : start + _LANES]
        for model in range(len(inputs)):
            x, lanes = inputs[model][start : start + _LANES], sums[model]
            for i in range(run.size):
                delta = np.float64(x[i] - run[i])
                lanes[i] += delta * delta if run_kept[i] else 0.0
    found: Floats = sums.sum(axis=1)
    return found


@compiled
def fuse(base: Floats, inputs: tuple[Floats, ...], kept: Flags, weights: Floats, least_divisor: float) -> None:
    """``base += Σ w_i m_i δ_i / max(Σ w_i m_i, least_divisor)`` where kept; ``m_i = [sign(δ_i) = sign(Σ δ_j)]``.

    Args:
        base: 1-D run, changed in place.
        inputs: one run per model; not changed.
        kept: 0 where the base stays.
        weights: one per model, in the dtype of ``base``.
        least_divisor: in the dtype of ``base``.
    """
    one, zero = base.dtype.type(1), base.dtype.type(0)
    all_signs, all_merged = np.empty(_BLOCK, base.dtype), np.empty(_BLOCK, base.dtype)
    all_divisors = np.empty(_BLOCK, base.dtype)
    for start in range(0, base.size, _BLOCK):
        run, run_kept = base[start : start + _BLOCK], kept[start : start + _BLOCK]
        signs, merged, divisors = all_signs[: run.size], all_merged[: run.size], all_divisors[: run.size]
        signs[:] = zero
        merged[:] = zero
        divisors[:] = zero
        for model in range(len(inputs)):
            x = inputs[model][start : start + run.size]
            for i in range(run.size):
                signs[i] += x[i] - run[i]
        for i in range(run.size):
            signs[i] = one if signs[i] >= zero else -one
        for model in range(len(inputs)):
            x, weight = inputs[model][start : start + run.size], weights[model]
            for i in range(run.size):
                # What agrees is positive. NaN, here or in a weight, is added, so that it shows; max() may hide it.
                agreeing = (x[i] - run[i]) * signs[i]
                merged[i] += (zero if agreeing < zero else agreeing) * weight  # noqa: FURB136
                divisors[i] += weight if agreeing > zero else zero
        for i in range(run.size):
            change = merged[i] / max(divisors[i], least_divisor) * signs[i]
            run[i] = run[i] + change if run_kept[i] else run[i]

"""Loops of `mergekit_ray.methods.ram`: each is one pass over a run of elements."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_ray.methods.compiled.jit import compiled

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
Counts = np.ndarray[Any, np.dtype[np.int64]]

_BLOCK = 1024
"""Elements at a time, whose sums stay in the first-level cache."""


@compiled
def count_changes(base: Floats, inputs: tuple[Floats, ...], epsilon: float) -> Counts:
    """Elements that each model changes by more than ``epsilon``, and those that it alone does: ``[2, num_models]``."""
    counts = np.zeros((2, len(inputs)), np.int64)
    all_changing = np.empty(_BLOCK, np.int32)
    for start in range(0, base.size, _BLOCK):
        run = base[start : start + _BLOCK]
        changing = all_changing[: run.size]
        changing[:] = 0
        for model in range(len(inputs)):
            x = inputs[model][start : start + run.size]
            for i in range(run.size):
                changing[i] += abs(x[i] - run[i]) > epsilon
        for model in range(len(inputs)):
            x, changed, alone = inputs[model][start : start + run.size], 0, 0
            for i in range(run.size):
                is_changed = abs(x[i] - run[i]) > epsilon
                changed += is_changed
                alone += is_changed & (changing[i] == 1)
            counts[0, model] += changed
            counts[1, model] += alone
    return counts


@compiled
def merge(base: Floats, inputs: tuple[Floats, ...], epsilon: float, gains: Floats) -> None:
    """Add the mean change of the models that change an element, times its gain where that is one model.

    Args:
        base: 1-D run, changed in place.
        inputs: one run per model; not changed.
        epsilon: changes up to this are none; in the dtype of ``base``.
        gains: one per model, in the dtype of ``base``.
    """
    one, zero = base.dtype.type(1), base.dtype.type(0)
    all_sums, all_numbers = np.empty(_BLOCK, base.dtype), np.empty(_BLOCK, base.dtype)
    all_gains = np.empty(_BLOCK, base.dtype)
    for start in range(0, base.size, _BLOCK):
        run = base[start : start + _BLOCK]
        sums, numbers, gain_sums = all_sums[: run.size], all_numbers[: run.size], all_gains[: run.size]
        sums[:] = zero
        numbers[:] = zero
        gain_sums[:] = zero
        for model in range(len(inputs)):
            x, gain = inputs[model][start : start + run.size], gains[model]
            for i in range(run.size):
                delta = x[i] - run[i]
                is_changed = abs(delta) > epsilon
                sums[i] += delta if is_changed else zero
                numbers[i] += one if is_changed else zero
                gain_sums[i] += gain if is_changed else zero
        for i in range(run.size):
            change = sums[i] * gain_sums[i] if numbers[i] == one else sums[i] / max(numbers[i], one)
            run[i] = run[i] + change if numbers[i] > zero else run[i]

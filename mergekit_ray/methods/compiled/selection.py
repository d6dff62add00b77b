"""Trims (see `mergekit_ray.methods.shared.selection`) over a run of elements, in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_ray.methods.compiled.jit import compiled

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
Flags = np.ndarray[Any, np.dtype[np.uint8]]


@compiled
def keep_between(values: Floats, low: float, high: float) -> None:
    """Zero magnitudes up to ``low`` and above ``high``, both in the dtype of ``values``; what is not a number stays."""
    zero = values.dtype.type(0)
    for i in range(values.size):
        magnitude = abs(values[i])
        values[i] = zero if (magnitude <= low) | (magnitude > high) else values[i]


@compiled
def keep_flagged(values: Floats, kept: Flags) -> None:
    """Zero the ``values`` whose flag is 0."""
    zero = values.dtype.type(0)
    for i in range(values.size):
        values[i] = values[i] if kept[i] else zero

"""Random masks (see `mergekit_ray.methods.random_mask`, whose words these are), hashed and applied in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_ray.methods.compiled.jit import compiled

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
Words = np.ndarray[Any, np.dtype[np.uint32]]

_LANES = 16
"""Independent partial sums, which the processor adds in parallel. Part of the result: the same everywhere."""


@compiled
def _word(mixed: np.uint32, a: np.uint32, b: np.uint32) -> np.uint32:
    """The word of one element. Every step is cut to 32 bits: the compiler's own integers are wider."""
    x = np.uint32(mixed + a)
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(0x7FEB352D))
    x = np.uint32(x + b)
    x = np.uint32(x ^ (x >> np.uint32(15)))
    return np.uint32(x * np.uint32(0x846CA68B))


@compiled
def fill_words(out: Words, offset: int, table: Words, keys: Words) -> None:
    """One word for each element of ``out``.

    Args:
        out: filled.
        offset: of its first element in the first hash block.
        table: ``mix(i)`` for every offset of a hash block.
        keys: the two key words of each hash block that the run touches, ``[num_blocks, 2]``.
    """
    place, first = 0, offset
    for block in range(keys.shape[0]):
        length = min(table.size - first, out.size - place)
        run, mixed, a, b = out[place : place + length], table[first : first + length], keys[block, 0], keys[block, 1]
        for i in range(length):
            run[i] = _word(mixed[i], a, b)
        place, first = place + length, 0


@compiled
def drop(values: Floats, offset: int, table: Words, keys: Words, limit: int) -> None:
    """Zero the ``values`` whose word, its top bit turned over, is not below ``limit``; the rest as for `fill_words`."""
    bound, turn, zero = np.uint32(limit), np.uint32(1 << 31), values.dtype.type(0)
    place, first = 0, offset
    for block in range(keys.shape[0]):
        length = min(table.size - first, values.size - place)
        run, mixed, a, b = values[place : place + length], table[first : first + length], keys[block, 0], keys[block, 1]
        for i in range(length):
            run[i] = run[i] if np.uint32(_word(mixed[i], a, b) ^ turn) < bound else zero
        place, first = place + length, 0


@compiled
def masked_norms(values: Floats, offset: int, table: Words, keys: Words, limit: int) -> tuple[float, float]:
    """``Σ|v|`` over all values and over those that `drop` would keep, in float64; nothing is changed."""
    bound, turn, zero = np.uint32(limit), np.uint32(1 << 31), values.dtype.type(0)
    whole, kept = np.zeros(_LANES), np.zeros(_LANES)
    place, first = 0, offset
    for block in range(keys.shape[0]):
        length = min(table.size - first, values.size - place)
        run, mixed, a, b = values[place : place + length], table[first : first + length], keys[block, 0], keys[block, 1]
        even = length // _LANES * _LANES
        for start in range(0, even, _LANES):
            for lane in range(_LANES):
                magnitude = abs(run[start + lane])
                whole[lane] += magnitude
                kept[lane] += magnitude if np.uint32(_word(mixed[start + lane], a, b) ^ turn) < bound else zero
        for i in range(even, length):
            magnitude = abs(run[i])
            whole[0] += magnitude
            kept[0] += magnitude if np.uint32(_word(mixed[i], a, b) ^ turn) < bound else zero
        place, first = place + length, 0
    return whole.sum(), kept.sum()

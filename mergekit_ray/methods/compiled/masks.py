"""Random masks, hashed and applied in one pass. The words are those of `methods.shared.random_mask`."""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_ray.methods.compiled.jit import compiled

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
Doubles = np.ndarray[Any, np.dtype[np.float64]]
Words = np.ndarray[Any, np.dtype[np.uint32]]

LANES = 16
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
    place, first = 0, offset
    for block in range(keys.shape[0]):
        length = min(table.size - first, values.size - place)
        drop_in_block(values[place : place + length], table[first : first + length], keys[block], limit)
        place, first = place + length, 0


@compiled
def drop_in_block(values: Floats, mixed: Words, key: Words, limit: int) -> None:
    """`drop` of values within one hash block.

    Args:
        values: changed in place.
        mixed: ``mix(i)`` of the offset of each.
        key: the block's two words.
        limit: see `drop`.
    """
    bound, turn, zero, a, b = np.uint32(limit), np.uint32(1 << 31), values.dtype.type(0), key[0], key[1]
    for i in range(values.size):
        values[i] = values[i] if np.uint32(_word(mixed[i], a, b) ^ turn) < bound else zero


@compiled
def masked_norms(values: Floats, offset: int, table: Words, keys: Words, limit: int) -> tuple[float, float]:
    """``Σ|v|`` over all values and over those that `drop` would keep, in float64; nothing is changed."""
    whole, kept = np.zeros(LANES), np.zeros(LANES)
    place, first = 0, offset
    for block in range(keys.shape[0]):
        length = min(table.size - first, values.size - place)
        add_norms(values[place : place + length], table[first : first + length], keys[block], limit, whole, kept)
        place, first = place + length, 0
    return whole.sum(), kept.sum()


@compiled
def add_norms(values: Floats, mixed: Words, key: Words, limit: int, whole: Doubles, kept: Doubles) -> None:
    """Add the magnitudes of values within one hash block to partial sums: element ``i`` to lane ``i % LANES``.

    What is left after whole rounds of `LANES` goes to the first lane.

    Args:
        values: not changed.
        mixed: ``mix(i)`` of the offset of each.
        key: the block's two words.
        limit: see `drop`.
        whole: lanes for all values.
        kept: lanes for those that are kept.
    """
    bound, turn, zero, a, b = np.uint32(limit), np.uint32(1 << 31), values.dtype.type(0), key[0], key[1]
    even = values.size // LANES * LANES
    for start in range(0, even, LANES):
        for lane in range(LANES):
            magnitude = abs(values[start + lane])
            whole[lane] += magnitude
            kept[lane] += magnitude if np.uint32(_word(mixed[start + lane], a, b) ^ turn) < bound else zero
    for i in range(even, values.size):
        magnitude = abs(values[i])
        whole[0] += magnitude
        kept[0] += magnitude if np.uint32(_word(mixed[i], a, b) ^ turn) < bound else zero

"""What of a run lies within a bracket of magnitudes (see `mergekit_ray.methods.shared.order_statistics`)."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from mergekit_ray.methods.compiled.jit import compiled

Patterns = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]


@compiled
def collect(patterns: Patterns, low: np.uint64, high: np.uint64, kept: Patterns) -> tuple[int, int, int, np.int64]:
    """Gather the patterns between ``low`` and ``high``, and count the others that are not below ``low``.

    The ends are only counted: a pattern that much of a tensor has is one of them.

    Args:
        patterns: 1-D.
        low: what is gathered is above it.
        high: and below this, which is at least as much.
        kept: as long; its beginning is filled with what is gathered, in order.

    Returns:
        How many patterns are above ``high``, equal to it, and equal to ``low`` (none if that is ``high``); and how many
        were gathered.
    """
    num_above, num_high, num_low = 0, 0, 0
    for i in range(patterns.size):
        num_above += patterns[i] > high
        num_high += patterns[i] == high
    if low == high:
        return num_above, num_high, 0, np.int64(0)
    for i in range(patterns.size):
        num_low += patterns[i] == low
    num_kept, first, width = np.int64(0), low + np.uint64(1), high - low - np.uint64(1)
    for i in range(patterns.size):
        pattern = patterns[i]
        kept[num_kept] = pattern
        num_kept += np.uint64(pattern) - first < width  # those below wrap around
    return num_above, num_high, num_low, num_kept


_DIGIT_BITS: Final = 12
"""Counts of so many bits' values stay in a core's nearest cache."""


@compiled
def nth_largest(patterns: Patterns, rank: int) -> tuple[np.uint64, int]:
    """By counting, from the top bits down: many are equal, which comparison-based selection is slow at.

    Args:
        patterns: 1-D.
        rank: from 1 for the largest, at most as many as there are.

    Returns:
        The pattern, and how many are above it.
    """
    among, num_above = patterns, 0
    while True:
        lowest, highest = among[0], among[0]
        for i in range(among.size):
            lowest, highest = min(lowest, among[i]), max(highest, among[i])
        first, shift = np.uint64(lowest), np.uint64(0)
        while (np.uint64(highest) - first) >> shift >= 1 << _DIGIT_BITS:
            shift += np.uint64(1)
        counts = np.zeros(1 << _DIGIT_BITS, np.int64)
        for i in range(among.size):
            counts[(np.uint64(among[i]) - first) >> shift] += 1
        digit = counts.size - 1
        while num_above + counts[digit] < rank:
            num_above += counts[digit]
            digit -= 1
        if shift == 0:
            return first + np.uint64(digit), num_above
        kept, number = np.empty(counts[digit] + 1, patterns.dtype), 0
        for i in range(among.size):
            kept[number] = among[i]
            number += (np.uint64(among[i]) - first) >> shift == digit
        among = kept[:number]

"""Magnitude sampling (see `mergekit_ray.methods.shared.rank_sampling`) of rows of magnitudes, without sorting them.

An element is kept if its random word is below a limit that rises with its rank. A histogram of the row narrows
every rank down to one bucket, which decides for nearly all elements: the word is below the limit of the bucket's lowest
rank, or not below that of its highest. Only the remaining elements are ranked exactly.

Magnitudes come as bit patterns: non-negative integers, ordered as the numbers are.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mergekit_ray.methods.compiled.jit import compiled

Integers = np.ndarray[Any, np.dtype[np.signedinteger[Any]]]
Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
Flags = np.ndarray[Any, np.dtype[np.uint8]]

_LANES = 256
"""Independent partial sums: enough for a loop of its own. Part of the result: the same everywhere."""
_MAX_BUCKET_BITS = 13
_OCTAVES_BITS = 3
"""Buckets divide 2^3 octaves of magnitudes evenly."""
_OCTAVES_BELOW = 5
"""How many of these are below the mean (of the patterns, so near the geometric mean of the magnitudes)."""
_FEW = 12
"""Up to so many elements of a row are ranked one by one against the row."""


@compiled
def limit_of(rank: int | np.int64, low: float, step: float) -> np.int64:
    """The signed word below which an element of this rank is kept: with probability ``low + step · rank``."""
    return np.int64(math.floor((low + step * rank) * 4294967296.0)) - np.int64(2147483648)


@compiled
def keep_rows(
    patterns: Integers, words: Integers, kept: Flags, length: int, low: float, step: float, mantissa_bits: int
) -> None:
    """Whether each element of some rows is kept.

    Args:
        patterns: the rows, one after the other, 1-D.
        words: random, int32, one per element.
        kept: filled with 0 and 1.
        length: of a row.
        low: probability of rank 0, the smallest magnitude.
        step: what each rank adds to it; not negative.
        mantissa_bits: by which a pattern is shifted to give its exponent.
    """
    bits = 2
    while bits < _MAX_BUCKET_BITS and (4 << bits) <= length:
        bits += 1
    starts = np.empty((1 << bits) + 1, np.int64)
    limits = np.empty((1 << bits, 2), np.int64)
    is_mixed = np.empty(1 << bits, np.uint8)
    values = np.empty(1 << bits, patterns.dtype)
    buckets, ordinals = np.empty(length, np.int32), np.empty(length, np.int32)
    undecided = np.empty(length, np.int64)
    for first in range(0, patterns.size, length):
        row, row_words = patterns[first : first + length], words[first : first + length]
        row_kept = kept[first : first + length]
        _find_buckets(row, buckets, bits, mantissa_bits)
        _count(row, buckets, ordinals, starts, values, is_mixed)
        for bucket in range(limits.shape[0]):
            limits[bucket, 0] = limit_of(starts[bucket], low, step)
            limits[bucket, 1] = limit_of(max(starts[bucket + 1] - 1, starts[bucket]), low, step)
        num_undecided = _decide(row_words, buckets, limits, row_kept, undecided)
        num_mixed = 0
        for i in undecided[:num_undecided]:
            bucket = buckets[i]
            row_kept[i] = row_words[i] < limit_of(starts[bucket + 1] - 1 - ordinals[i], low, step)
            undecided[num_mixed] = i
            num_mixed += is_mixed[bucket]
        if num_mixed > _FEW:
            _decide_by_sorting(row, row_words, buckets, starts, undecided[:num_mixed], row_kept, low, step)
        else:
            for i in undecided[:num_mixed]:
                row_kept[i] = row_words[i] < limit_of(_rank(row, i), low, step)


@compiled
def _find_buckets(row: Integers, buckets: Integers, bits: int, mantissa_bits: int) -> None:
    """The bucket of each element. Zeros, which may be most of a row, have the first to themselves."""
    total, num_nonzero, spared_bits = 0, 0, mantissa_bits - 23  # so that a sum fits in 64 bits
    for i in range(row.size):
        total += row[i] >> spared_bits
        num_nonzero += row[i] != 0
    octave = np.int64(1) << mantissa_bits
    lowest = max(((total // max(num_nonzero, 1)) << spared_bits) - _OCTAVES_BELOW * octave, 0)
    shift = max(mantissa_bits + _OCTAVES_BITS - bits, 0)
    last = np.int64((1 << bits) - 1)
    for i in range(row.size):
        bucket = min(max(((row[i] - lowest) >> shift) + 1, 1), last)
        buckets[i] = bucket if row[i] != 0 else 0


@compiled
def _count(
    row: Integers, buckets: Integers, ordinals: Integers, starts: Integers, values: Integers, is_mixed: Flags
) -> None:
    """How many elements are in the buckets before each, and the place of each element in its bucket, by index.

    Where all magnitudes in a bucket are equal, that gives their ranks: the usual case of buckets with many elements,
    since differences of 16-bit weights have few magnitudes. Other buckets are mixed.
    """
    starts[:] = 0
    values[:] = -1
    is_mixed[:] = 0
    for i in range(row.size):
        bucket = buckets[i]
        count, value = starts[bucket + 1], values[bucket]
        ordinals[i] = count
        is_mixed[bucket] |= (value != row[i]) & (count != 0)
        values[bucket] = row[i]
        starts[bucket + 1] = count + 1
    for bucket in range(1, starts.size):
        starts[bucket] += starts[bucket - 1]


@compiled
def _decide(words: Integers, buckets: Integers, limits: Integers, kept: Flags, undecided: Integers) -> int:
    """Decide by the limits of the buckets; returns how many elements are left, whose places go to ``undecided``."""
    number = 0
    for i in range(words.size):
        word, bucket = np.int64(words[i]), buckets[i]
        is_below = word < limits[bucket, 0]
        kept[i] = is_below
        undecided[number] = i
        number += (word < limits[bucket, 1]) & (not is_below)
    return number


@compiled
def _rank(row: Integers, place: int) -> np.int64:
    """How many magnitudes of the row are smaller; of equal ones the lower index is the larger."""
    pattern, rank = row[place], np.int64(0)
    for i in range(place):
        rank += row[i] < pattern
    for i in range(place + 1, row.size):
        rank += row[i] <= pattern
    return rank


@compiled
def _decide_by_sorting(
    row: Integers,
    words: Integers,
    buckets: Integers,
    starts: Integers,
    undecided: Integers,
    kept: Flags,
    low: float,
    step: float,
) -> None:
    """Decide all of the buckets that an undecided element is in, by sorting them."""
    is_sorted = np.zeros(starts.size - 1, np.uint8)
    for i in undecided:
        is_sorted[buckets[i]] = 1
    ends = starts[:-1].copy()
    places = np.empty(row.size, np.int64)
    for i in range(row.size - 1, -1, -1):  # so that of equal magnitudes the lowest index comes last
        bucket = buckets[i]
        if is_sorted[bucket]:
            places[ends[bucket]] = i
            ends[bucket] += 1
    for bucket in range(is_sorted.size):
        if is_sorted[bucket]:
            first = starts[bucket]
            members = places[first : ends[bucket]]
            _sort(members, row)
            for i in range(members.size):
                kept[members[i]] = words[members[i]] < limit_of(first + i, low, step)


@compiled
def _sort(members: Integers, row: Integers) -> None:
    """Sort places by their magnitudes, of equal ones the lowest last (by Shell's method: most are few, or in order)."""
    gap = 1
    while 3 * gap < members.size:
        gap = 3 * gap + 1
    while gap:
        for i in range(gap, members.size):
            member = members[i]
            pattern, place = row[member], i
            while place >= gap:
                other = members[place - gap]
                if row[other] < pattern or (row[other] == pattern and other > member):
                    break
                members[place] = other
                place -= gap
            members[place] = member
        gap //= 3


@compiled
def kept_norms(magnitudes: Floats, kept: Flags) -> tuple[float, float]:
    """The sum of all ``magnitudes`` and that of the kept ones, in float64."""
    zero = magnitudes.dtype.type(0)
    whole, part = np.zeros(_LANES), np.zeros(_LANES)
    for start in range(0, magnitudes.size, _LANES):
        run, run_kept = magnitudes[start : start + _LANES], kept[start : start + _LANES]
        for lane in range(run.size):
            whole[lane] += run[lane]
            part[lane] += run[lane] if run_kept[lane] else zero
    return whole.sum(), part.sum()

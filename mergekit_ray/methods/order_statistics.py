"""The k-th largest magnitude of a tensor that is seen block by block: exact, without a sort of the tensor.

Magnitudes are compared as bit patterns: the bits of a floating number without its sign are ordered as its absolute
value is (infinity above all numbers, NaN above infinity; −0.0 equals 0.0).

Two ways to the same answer:

- *bracket* (CPU): a sample gives two patterns that the k-th largest almost surely lies between; one pass counts what
  is above and collects the few per cent between, in block order; the answer is selected among those. numpy does the
  comparisons: its masks cost a fifth of torch's.
- *radix* (any device, and where the sample misled or too much would be collected): one histogram pass per 16 bits of
  the pattern. Never synchronises with the device inside a pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from mergekit_ray.methods.protocol import BLOCK_ELEMENTS, Chunk, Operands

if TYPE_CHECKING:
    import numpy as np
    import torch

    Patterns = np.ndarray[Any, np.dtype[Any]]

Values = Callable[[Chunk, int], "torch.Tensor"]
"""``(chunk, index)`` to the 1-D run, one of the chunk's own tensors, whose magnitudes are ranked."""

_SAMPLE = 1 << 16
"""Elements of the sample, about."""
_SAMPLED_BLOCKS = 16
_SMALL_BLOCKS = 4
"""Tensors of no more blocks are collected whole, without a sample."""
_DIGIT_BITS = 16
_NUM_DIGITS = 1 << _DIGIT_BITS


@dataclass(frozen=True, slots=True)
class Threshold:
    """The k-th largest magnitude.

    Attributes:
        pattern: its bits without the sign.
        num_equal_kept: how many of the elements equal to it belong to the k largest.
        is_exhausted: whether those are all there are.
        equal_per_block: elements equal to it in each block, or None if not known yet.
    """

    pattern: int
    num_equal_kept: int
    is_exhausted: bool
    equal_per_block: Sequence[int] | None


def kth_largest(operands: Operands, ranks: dict[int, int], values: Values) -> dict[int, Threshold]:
    """The ``ranks[index]``-th largest magnitude (from 1) of ``values(chunk, index)``, for all indices in one pass.

    Args:
        operands: the tensor; not empty.
        ranks: ``1 <= rank <= operands.num_elements`` by index.
        values: gives the run to rank.
    """
    found: dict[int, Threshold] = {}
    if operands.block(0, lambda chunk: chunk.inputs[0].device.type) == "cpu":
        found = by_bracket(operands, ranks, values)
    missing = {index: rank for index, rank in ranks.items() if index not in found}
    return found | (by_radix(operands, missing, values) if missing else {})


def patterns_(values: torch.Tensor) -> torch.Tensor:
    """The bits of ``values`` without their signs, as signed integers of the same width, in place of the values."""
    import torch  # noqa: PLC0415 - declarations are read without torch

    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]
    return values.view(integers).bitwise_and_(torch.iinfo(integers).max)


def by_bracket(operands: Operands, ranks: dict[int, int], values: Values) -> dict[int, Threshold]:
    """`kth_largest` by sample and bracket, for tensors on the CPU; without those indices it did not work out for."""
    import numpy as np  # noqa: PLC0415 - imported where it works, as torch is

    num_elements = operands.num_elements
    brackets = _brackets(operands, ranks, values)
    given_up: set[int] = set()
    room = dict.fromkeys(ranks, BLOCK_ELEMENTS * _SMALL_BLOCKS + num_elements // 4)

    def collect(chunk: Chunk) -> dict[int, tuple[int, Patterns]]:
        return {index: between(chunk, index, *bracket) for index, bracket in brackets.items() if index not in given_up}

    def between(chunk: Chunk, index: int, low: int, high: int) -> tuple[int, Patterns]:
        patterns = patterns_(values(chunk, index)).numpy()
        above = patterns > high
        kept = patterns[np.not_equal(patterns >= low, above)]
        # Threads may lose updates of this count; that only delays giving up, and both ways give the same answer.
        room[index] -= len(kept)
        if room[index] < 0:
            given_up.add(index)
        return int(np.count_nonzero(above)), kept

    blocks = operands.map_blocks(collect)
    found = {}
    for index, (low, _) in brackets.items():
        if index not in given_up:
            threshold = _among([block[index] for block in blocks], ranks[index], low, num_elements)
            if threshold is not None:
                found[index] = threshold
    return found


def _brackets(operands: Operands, ranks: dict[int, int], values: Values) -> dict[int, tuple[int, int]]:
    """Lowest and highest pattern to collect; the lowest is never 0, since zeros may be most of a tensor."""
    import numpy as np  # noqa: PLC0415

    num_elements = operands.num_elements
    num_blocks = -(-num_elements // BLOCK_ELEMENTS)
    highest = _highest_pattern(operands)
    if num_blocks <= _SMALL_BLOCKS:
        return dict.fromkeys(ranks, (1, highest))
    # Blocks evenly apart, and an odd stride within them, so that all columns of a matrix are seen.
    sampled = sorted({place * num_blocks // _SAMPLED_BLOCKS for place in range(_SAMPLED_BLOCKS)})
    stride = (len(sampled) * BLOCK_ELEMENTS // _SAMPLE) | 1

    def sample(chunk: Chunk) -> dict[int, Patterns]:
        return {index: patterns_(values(chunk, index)).numpy()[::stride].copy() for index in ranks}

    runs = [operands.block(block, sample) for block in sampled]
    brackets = {}
    for index, rank in ranks.items():
        ascending = np.sort(np.concatenate([run[index] for run in runs]))
        size = len(ascending)
        part = rank / num_elements
        # Six standard deviations of a binomial, and half a per cent for blocks that differ from each other.
        margin = int(6 * (size * part * (1 - part)) ** 0.5) + size // 200 + 1
        place = size - int(part * size)
        low = int(ascending[place - margin]) if place >= margin else 0
        high = int(ascending[place + margin]) if place + margin < size else highest
        brackets[index] = max(low, 1), max(high, 1)
    return brackets


def _among(blocks: Sequence[tuple[int, Patterns]], rank: int, low: int, num_elements: int) -> Threshold | None:
    """The answer from what was collected, or None if it is not there."""
    import numpy as np  # noqa: PLC0415

    collected = np.concatenate([kept for _, kept in blocks])
    above = sum(count for count, _ in blocks)
    wanted = rank - above
    if wanted <= 0:
        return None
    if wanted > len(collected):
        if low > 1:
            return None
        zeros = [
            min(BLOCK_ELEMENTS, num_elements - place * BLOCK_ELEMENTS) - count - len(kept)
            for place, (count, kept) in enumerate(blocks)
        ]
        remaining = wanted - len(collected)
        return Threshold(0, remaining, remaining == sum(zeros), zeros)
    pattern = _nth_largest(collected, wanted)
    equal = [int(np.count_nonzero(kept == pattern)) for _, kept in blocks]
    remaining = wanted - int(np.count_nonzero(collected > pattern))
    return Threshold(pattern, remaining, remaining == sum(equal), equal)


def _nth_largest(patterns: Patterns, rank: int) -> int:
    """By counting, from the top bits down: many are equal, which comparison-based selection is slow at."""
    import numpy as np  # noqa: PLC0415

    while True:
        lowest = int(patterns.min())
        shift = max(0, (int(patterns.max()) - lowest).bit_length() - _DIGIT_BITS)
        digits = (patterns - lowest) >> shift
        at_least = np.cumsum(np.bincount(digits)[::-1])
        place = int(np.searchsorted(at_least, rank))
        digit = len(at_least) - 1 - place
        if shift == 0:
            return lowest + digit
        rank -= int(at_least[place - 1]) if place else 0
        patterns = patterns[digits == digit]


def by_radix(operands: Operands, ranks: dict[int, int], values: Values) -> dict[int, Threshold]:
    """`kth_largest` by histograms of 16 bits at a time, from the top."""
    import torch  # noqa: PLC0415

    prefix = dict.fromkeys(ranks, 0)
    wanted = dict(ranks)
    equal = dict.fromkeys(ranks, 0)
    for shift in range(_highest_pattern(operands).bit_length() + 1 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        for index, histogram in _histograms(operands, prefix, shift, values).items():
            descending = histogram[:_NUM_DIGITS].flip(0)
            at_least = descending.cumsum(0)
            place = int(torch.searchsorted(at_least, wanted[index]))
            equal[index] = int(descending[place])
            wanted[index] -= int(at_least[place]) - equal[index]
            prefix[index] = (prefix[index] << _DIGIT_BITS) + _NUM_DIGITS - 1 - place
    return {index: Threshold(prefix[index], wanted[index], wanted[index] == equal[index], None) for index in ranks}


def _histograms(operands: Operands, prefix: dict[int, int], shift: int, values: Values) -> dict[int, torch.Tensor]:
    """Counts of the digit at ``shift`` among patterns that have the prefix above it; all others in one extra place."""
    import torch  # noqa: PLC0415

    # One set of histograms per thread: integer counts, so the order of their addition does not matter.
    sets: dict[int, dict[int, torch.Tensor]] = {}

    def count(chunk: Chunk) -> None:
        histograms = sets.setdefault(threading.get_ident(), {})
        for index, head in prefix.items():
            patterns = patterns_(values(chunk, index))
            if index not in histograms:
                histograms[index] = torch.zeros(_NUM_DIGITS + 1, dtype=torch.int64, device=patterns.device)
            digits = (patterns >> shift).to(torch.int64).sub_(head << _DIGIT_BITS)
            digits = torch.where((digits < 0) | (digits >= _NUM_DIGITS), _NUM_DIGITS, digits)
            histograms[index].scatter_add_(0, digits, torch.ones_like(digits))

    operands.map_blocks(count)
    parts = list(sets.values())
    return {index: torch.stack([part[index] for part in parts]).sum(dim=0) for index in prefix}


def cut_after(operands: Operands, index: int, threshold: Threshold, values: Values) -> int:
    """Flat index before which elements equal to the threshold are kept, so that ``num_equal_kept`` are."""
    if threshold.is_exhausted:
        return operands.num_elements

    def equals(chunk: Chunk) -> torch.Tensor:
        return patterns_(values(chunk, index)) == threshold.pattern

    counts = threshold.equal_per_block
    if counts is None:
        # Left on the device until all are there: one synchronisation, not one per block.
        import torch  # noqa: PLC0415

        counts = torch.stack(operands.map_blocks(lambda chunk: equals(chunk).sum())).tolist()
    up_to = list(accumulate(counts))
    block = next(place for place, count in enumerate(up_to) if count >= threshold.num_equal_kept)
    nth = threshold.num_equal_kept - (up_to[block] - counts[block])
    return operands.block(block, lambda chunk: chunk.start + int(equals(chunk).nonzero()[nth - 1]) + 1)


def _highest_pattern(operands: Operands) -> int:
    return (1 << (8 * operands.compute_dtype.itemsize - 1)) - 1

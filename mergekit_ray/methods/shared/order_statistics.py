"""The k-th largest magnitude of a tensor that is seen block by block: exact, without a sort of the tensor.

Magnitudes are compared as bit patterns: the bits of a floating number without its sign are ordered as its absolute
value is (infinity above all numbers, NaN above infinity; −0.0 equals 0.0).

Two ways to the same answer:

- *bracket* (CPU): a sample gives two patterns that the k-th largest almost surely lies between; one pass counts what
  is above and at the two, and collects the few per cent between, in block order; the answer is one of the two, or
  selected among those.
- *radix* (any device, and where the sample misled or too much would be collected): one histogram pass per 16 bits of
  the pattern. Never synchronises with the device inside a pass.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_ray.methods.shared.protocol import BLOCK_ELEMENTS, Chunk, Operands

if TYPE_CHECKING:
    import numpy as np
    import torch

    Patterns = np.ndarray[Any, np.dtype[Any]]

Values = Callable[[Chunk, int], "torch.Tensor"]
"""``(chunk, index)`` to the 1-D run, one of the chunk's own tensors, whose magnitudes are ranked."""

Ranks = Mapping[int, int]
"""Ranks that are looked for, from 1 for the largest, each at a place of the caller's."""

_SAMPLE = 1 << 16
"""Elements of the sample, about."""
_SAMPLED_BLOCKS = 16
SMALL_BLOCKS = 4
"""Tensors of no more blocks are collected whole, without a sample."""
_COLLECTED_PART = 20
"""At most one in so many elements is collected beyond `SMALL_BLOCKS`: brackets are up to 3.4 % wide."""
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


class _Block(NamedTuple):
    """What was found in a block: numbers of patterns above a bracket, at its ends, and the patterns between these."""

    num_above: int
    num_high: int
    num_low: int
    between: Patterns


def collected_bytes(num_elements: int, num_places: int, itemsize: int) -> int:
    """The most that `kth_largest` collects at so many places on the CPU, and what it selects one answer from."""
    return (num_places + 2) * _room(num_elements) * itemsize


def _room(num_elements: int) -> int:
    """Elements that may be collected at a place."""
    return min(num_elements, BLOCK_ELEMENTS * SMALL_BLOCKS + num_elements // _COLLECTED_PART)


def _same(place: int) -> int:
    return place


def kth_largest(
    operands: Operands, ranks: Ranks, values: Values, index_of: Callable[[int], int] = _same
) -> dict[int, Threshold]:
    """The ``ranks[place]``-th largest magnitude (from 1) of a run, for all places in one pass.

    Args:
        operands: the tensor; not empty.
        ranks: ``1 <= rank <= operands.num_elements`` by place.
        values: gives the run to rank, asked for once per chunk and index.
        index_of: the index of the run that a place's rank is looked for in, by default the place. Several ranks of one
            run are places with one index.
    """
    found: dict[int, Threshold] = {}
    if operands.block(0, lambda chunk: chunk.inputs[0].device.type) == "cpu":
        found = by_bracket(operands, ranks, values, index_of)
    missing = {place: rank for place, rank in ranks.items() if place not in found}
    return found | (by_radix(operands, missing, values, index_of) if missing else {})


def _by_index(places: Iterable[int], index_of: Callable[[int], int]) -> dict[int, list[int]]:
    """The places of each index."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place in places:
        groups[index_of(place)].append(place)
    return groups


def patterns_(values: torch.Tensor) -> torch.Tensor:
    """The bits of ``values`` without their signs, as signed integers of the same width, in place of the values."""
    import torch  # noqa: PLC0415 - declarations are read without torch

    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]
    return values.view(integers).bitwise_and_(torch.iinfo(integers).max)


def by_bracket(
    operands: Operands, ranks: Ranks, values: Values, index_of: Callable[[int], int] = _same
) -> dict[int, Threshold]:
    """`kth_largest` by sample and bracket, for tensors on the CPU; without those places it did not work out for."""
    import numpy as np  # noqa: PLC0415 - imported where it works, as torch is

    from mergekit_ray.methods.compiled import brackets  # noqa: PLC0415 - compilers load where they are needed

    num_elements = operands.num_elements
    limits = _brackets(operands, ranks, values, index_of)
    given_up: set[int] = set()
    room = dict.fromkeys(ranks, _room(num_elements))

    def collect(chunk: Chunk) -> dict[int, _Block]:
        found: dict[int, _Block] = {}
        for index, places in _by_index((place for place in limits if place not in given_up), index_of).items():
            patterns = patterns_(values(chunk, index))
            gathered = chunk.scratch.like(patterns).numpy()
            found |= {place: between(patterns.numpy(), place, *limits[place], gathered) for place in places}
        return found

    def between(patterns: Patterns, place: int, low: int, high: int, gathered: Patterns) -> _Block:
        bits = f"u{patterns.itemsize}"  # the same numbers, as none is negative
        *counts, num_kept = brackets.collect(patterns.view(bits), np.uint64(low), np.uint64(high), gathered.view(bits))
        # Threads may lose updates of this count; that only delays giving up, and both ways give the same answer.
        room[place] -= int(num_kept)
        if room[place] < 0:
            given_up.add(place)
        above, at_high, at_low = map(int, counts)
        return _Block(above, at_high, at_low, gathered[:num_kept].copy())

    blocks = operands.map_blocks(collect)
    found = {}
    for place, bracket in limits.items():
        collected = [block.pop(place) for block in blocks if place in block]
        if place not in given_up:
            threshold = _among(collected, ranks[place], bracket, num_elements)
            if threshold is not None:
                found[place] = threshold
    return found


def _brackets(
    operands: Operands, ranks: Ranks, values: Values, index_of: Callable[[int], int]
) -> dict[int, tuple[int, int]]:
    """Lowest and highest pattern to collect; the lowest is never 0, since zeros may be most of a tensor."""
    import numpy as np  # noqa: PLC0415

    num_elements = operands.num_elements
    num_blocks = -(-num_elements // BLOCK_ELEMENTS)
    highest = _highest_pattern(operands)
    if num_blocks <= SMALL_BLOCKS:
        return dict.fromkeys(ranks, (1, highest))
    # Blocks evenly apart, and an odd stride within them, so that all columns of a matrix are seen.
    sampled = sorted({place * num_blocks // _SAMPLED_BLOCKS for place in range(_SAMPLED_BLOCKS)})
    stride = (len(sampled) * BLOCK_ELEMENTS // _SAMPLE) | 1
    groups = _by_index(ranks, index_of)

    def sample(chunk: Chunk) -> dict[int, Patterns]:
        return {index: patterns_(values(chunk, index)).numpy()[::stride].copy() for index in groups}

    runs = operands.map_some(sampled, sample)
    brackets = {}
    for index, places in groups.items():
        ascending = np.sort(np.concatenate([run[index] for run in runs]))
        for place in places:
            low, high = _bracket(ascending, ranks[place] / num_elements, highest)
            brackets[place] = max(low, 1), max(high, 1)
    return brackets


def _bracket(ascending: Patterns, part: float, highest: int) -> tuple[int, int]:
    """Patterns that the one with ``part`` of all above it almost surely lies between."""
    size = len(ascending)
    # Six standard deviations of a binomial, and half a per cent for blocks that differ from each other.
    margin = int(6 * (size * part * (1 - part)) ** 0.5) + size // 200 + 1
    middle = size - int(part * size)
    low = int(ascending[middle - margin]) if middle >= margin else 0
    high = int(ascending[middle + margin]) if middle + margin < size else highest
    return low, high


def _among(blocks: Sequence[_Block], rank: int, bracket: tuple[int, int], num_elements: int) -> Threshold | None:
    """The answer from what was found in all blocks, or None if it is not there."""
    import numpy as np  # noqa: PLC0415

    from mergekit_ray.methods.compiled import brackets  # noqa: PLC0415

    low, high = bracket
    wanted = rank - sum(block.num_above for block in blocks)
    if wanted <= 0:
        return None
    equal = [block.num_high for block in blocks]
    if wanted <= sum(equal):
        return Threshold(high, wanted, wanted == sum(equal), equal)
    wanted -= sum(equal)
    num_between = sum(len(block.between) for block in blocks)
    if wanted <= num_between:
        collected = np.concatenate([block.between for block in blocks])
        pattern, above = brackets.nth_largest(collected.view(f"u{collected.itemsize}"), wanted)
        equal = [int(np.count_nonzero(block.between == pattern)) for block in blocks]
        remaining = wanted - above
        return Threshold(int(pattern), remaining, remaining == sum(equal), equal)
    wanted -= num_between
    equal = [block.num_low for block in blocks]
    if wanted <= sum(equal):
        return Threshold(low, wanted, wanted == sum(equal), equal)
    if low > 1:
        return None
    wanted -= sum(equal)
    equal = [
        min(BLOCK_ELEMENTS, num_elements - place * BLOCK_ELEMENTS) - sum(block[:3]) - len(block.between)
        for place, block in enumerate(blocks)
    ]
    return Threshold(0, wanted, wanted == sum(equal), equal)


def by_radix(
    operands: Operands, ranks: Ranks, values: Values, index_of: Callable[[int], int] = _same
) -> dict[int, Threshold]:
    """`kth_largest` by histograms of 16 bits at a time, from the top."""
    import torch  # noqa: PLC0415

    prefix = dict.fromkeys(ranks, 0)
    wanted = dict(ranks)
    equal = dict.fromkeys(ranks, 0)
    for shift in range(_highest_pattern(operands).bit_length() + 1 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        for place, histogram in _histograms(operands, prefix, shift, values, index_of).items():
            descending = histogram[:_NUM_DIGITS].flip(0)
            at_least = descending.cumsum(0)
            digit = int(torch.searchsorted(at_least, wanted[place]))
            equal[place] = int(descending[digit])
            wanted[place] -= int(at_least[digit]) - equal[place]
            prefix[place] = (prefix[place] << _DIGIT_BITS) + _NUM_DIGITS - 1 - digit
    return {place: Threshold(prefix[place], wanted[place], wanted[place] == equal[place], None) for place in ranks}


def _histograms(
    operands: Operands, prefix: Mapping[int, int], shift: int, values: Values, index_of: Callable[[int], int]
) -> dict[int, torch.Tensor]:
    """Counts of the digit at ``shift`` among patterns that have the prefix above it.

    Others, most of a tensor, are counted in as many places of their own behind those, by turns: GPUs add to one place
    one after the other.
    """
    import torch  # noqa: PLC0415

    # One set of histograms per thread: integer counts, so the order of their addition does not matter.
    sets: dict[int, dict[int, torch.Tensor]] = {}
    groups = _by_index(prefix, index_of)

    def count(chunk: Chunk) -> None:
        histograms = sets.setdefault(threading.get_ident(), {})
        for index, places in groups.items():
            patterns = patterns_(values(chunk, index))
            others = torch.arange(patterns.numel(), device=patterns.device).bitwise_and_(_NUM_DIGITS - 1)
            others.add_(_NUM_DIGITS)
            for place in places:
                if place not in histograms:
                    histograms[place] = torch.zeros(2 * _NUM_DIGITS, dtype=torch.int64, device=patterns.device)
                digits = (patterns >> shift).to(torch.int64).sub_(prefix[place] << _DIGIT_BITS)
                digits = torch.where((digits < 0) | (digits >= _NUM_DIGITS), others, digits)
                histograms[place].scatter_add_(0, digits, torch.ones_like(digits))

    operands.map_blocks(count)
    parts = list(sets.values())
    return {place: torch.stack([part[place] for part in parts]).sum(dim=0) for place in prefix}


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

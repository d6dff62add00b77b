"""Sums of changes that random masks keep in part, from the numbers in memory, without torch.

Arguments are those of `mergekit_ray.methods.compiled.runs`. What is dropped, elected and added is what
`masks`, `election` and `mergekit_ray.methods.shared.accumulate` drop, elect and add, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_ray.methods.compiled.election import add_elected_block
from mergekit_ray.methods.compiled.intrinsics import fma
from mergekit_ray.methods.compiled.jit import compiled
from mergekit_ray.methods.compiled.masks import LANES, Words, add_norms, drop_in_block
from mergekit_ray.methods.compiled.runs import (
    BLOCK,
    Addresses,
    Doubles,
    Floats,
    Place,
    Widths,
    all_finite_floats,
    read,
    read_change,
    store,
)

Limits = np.ndarray[Any, np.dtype[np.int64]]

Masks = tuple[int, Words, Words, Limits]
"""The offset of a run's first element in its hash block; ``mix(i)`` of every offset in one; the key words of the hash
blocks that the run touches, ``[masks, blocks, 2]``; and each mask's limit, below which a word must be for its element
to be kept: 2^32 keeps all, 0 none."""

Steps = tuple[bool, np.float32, np.float32]
"""Whether products are rounded before they are added (otherwise they are added fused); what the sum is divided by, and
what it is multiplied with then: 1 to leave that out."""

Election = tuple[Floats, np.float32, np.float32]
"""``weights``, ``scale`` and ``zero_divisor`` of `election.add_elected`."""

_ALL = 1 << 32


@compiled
def norms_of_kept(
    addresses: Addresses, widths: Widths, base: Place, masks: Masks, size: int, part: int, found: Doubles
) -> None:
    """Partial sums of ``|x - base|``, over all elements and over those that are kept, as `masked_norms` has them.

    Args:
        addresses: of the first element of each tensor's run, which a hash block begins with.
        widths: of the tensors' elements, bytes.
        base: where its run is.
        masks: of the tensors.
        size: elements.
        part: elements in a partial sum, of so many whole hash blocks.
        found: filled with ``[parts, tensors, 2]``; NaN for tensors whose mask keeps all or nothing.
    """
    base_address, base_width = base
    _, table, keys, limits = masks
    number, block = addresses.size, min(BLOCK, size)
    origin_block, x_block = np.empty(block, np.float32), np.empty(block, np.float32)
    lanes = np.empty((number, 2, LANES))
    for index in range(found.shape[0]):
        lanes[:] = 0.0
        for start in range(index * part, min((index + 1) * part, size), BLOCK):
            length = min(BLOCK, size - start)
            origin, x = origin_block[:length], x_block[:length]
            read(base_address + start * base_width, base_width, origin)
            hash_block, first = start // table.size, start % table.size
            mixed = table[first : first + length]
            for k in range(number):
                if 0 < limits[k] < _ALL:
                    read_change(addresses[k] + start * widths[k], widths[k], origin, x)
                    add_norms(x, mixed, keys[k, hash_block], limits[k], lanes[k, 0], lanes[k, 1])
        for k in range(number):
            is_trimmed = 0 < limits[k] < _ALL
            found[index, k, 0] = lanes[k, 0].sum() if is_trimmed else np.nan
            found[index, k, 1] = lanes[k, 1].sum() if is_trimmed else np.nan


@compiled
def sum_of_kept(
    addresses: Addresses,
    widths: Widths,
    base: Place,
    masks: Masks,
    factors: Floats,
    steps: Steps,
    out: Place,
    size: int,
) -> bool:
    """``base + scale · (Σ factor_i d_i) / divisor``, with ``d_i`` what is kept of ``x_i - base``.

    Args:
        addresses: of the first element of each input's run.
        widths: of the inputs' elements, bytes.
        base: where its run is.
        masks: of the inputs.
        factors: one per input.
        steps: how else.
        out: where as many elements go.
        size: elements.

    Returns:
        Whether all changes are finite, kept or not, and so is the result as it was stored.
    """
    out_address, out_width = out
    origin_block, changes = np.empty(BLOCK, np.float32), np.empty((addresses.size, BLOCK), np.float32)
    total_block = np.empty(BLOCK, np.float32)
    is_finite, start = True, 0
    while start < size:
        length = _length_of_block(masks, start, size)
        origin, total = origin_block[:length], total_block[:length]
        is_finite &= _read_kept(addresses, widths, base, masks, start, origin, changes)
        for k in range(addresses.size):
            _add_term(changes[k, :length], factors[k], k == 0, steps, total)
        _finish(total, steps)
        _add(origin, total)
        is_finite &= store(total, out_address + start * out_width, out_width)
        start += length
    return is_finite


@compiled
def elected_of_kept(
    addresses: Addresses,
    widths: Widths,
    base: Place,
    masks: Masks,
    factors: Floats,
    election: Election,
    out: Place,
    size: int,
) -> bool:
    """The base and what sign election makes of what is kept of the changes, see `election.add_elected`.

    Arguments and result are those of `sum_of_kept`, ``election`` in place of the steps.
    """
    out_address, out_width = out
    weights, scale, zero_divisor = election
    origin_block, changes = np.empty(BLOCK, np.float32), np.empty((addresses.size, BLOCK), np.float32)
    space = np.empty((3, BLOCK), np.float32)
    is_finite, start = True, 0
    while start < size:
        length = _length_of_block(masks, start, size)
        origin = origin_block[:length]
        is_finite &= _read_kept(addresses, widths, base, masks, start, origin, changes)
        add_elected_block(origin, changes, 0, factors, weights, scale, zero_divisor, space)
        is_finite &= store(origin, out_address + start * out_width, out_width)
        start += length
    return is_finite


@compiled
def _length_of_block(masks: Masks, start: int, size: int) -> int:
    """Elements from ``start`` on that are handled together: at most `BLOCK`, and of one hash block."""
    offset, table, _, _ = masks
    return min(BLOCK, size - start, table.size - (offset + start) % table.size)


@compiled
def _read_kept(
    addresses: Addresses,
    widths: Widths,
    base: Place,
    masks: Masks,
    start: int,
    origin: Floats,
    changes: Floats,
) -> bool:
    """The base, and what is kept of the changes, of a run within one hash block; whether all changes are finite."""
    base_address, base_width = base
    offset, table, keys, limits = masks
    hash_block, first = (offset + start) // table.size, (offset + start) % table.size
    mixed = table[first : first + origin.size]
    read(base_address + start * base_width, base_width, origin)
    is_finite = True
    for k in range(addresses.size):
        change = changes[k, : origin.size]
        read_change(addresses[k] + start * widths[k], widths[k], origin, change)
        is_finite &= all_finite_floats(change)
        if limits[k] <= 0:
            change[:] = np.float32(0.0)
        elif limits[k] < _ALL:
            drop_in_block(change, mixed, keys[k, hash_block], limits[k])
    return is_finite


@compiled
def _add_term(x: Floats, factor: np.float32, is_first: bool, steps: Steps, total: Floats) -> None:
    """``factor · x`` onto a sum, or as the first term of one."""
    if is_first:
        _multiply(x, factor, total)
    elif steps[0]:
        _add_rounded(x, factor, total)
    else:
        _add_fused(x, factor, total)


@compiled
def _finish(total: Floats, steps: Steps) -> None:
    """Divide and multiply a sum."""
    _, divisor, scale = steps
    if divisor != np.float32(1.0):
        _divide(total, divisor)
    if scale != np.float32(1.0):
        _multiply(total, scale, total)


@compiled
def _multiply(x: Floats, factor: np.float32, out: Floats) -> None:
    for i in range(x.size):
        out[i] = x[i] * factor


@compiled
def _add_fused(x: Floats, factor: np.float32, total: Floats) -> None:
    for i in range(x.size):
        total[i] = fma(x[i], factor, total[i])


@compiled
def _add_rounded(x: Floats, factor: np.float32, total: Floats) -> None:
    for i in range(x.size):
        total[i] += x[i] * factor


@compiled
def _add(x: Floats, total: Floats) -> None:
    """``x`` onto a sum."""
    for i in range(x.size):
        total[i] += x[i]


@compiled
def _divide(total: Floats, divisor: np.float32) -> None:
    for i in range(total.size):
        total[i] /= divisor

"""Sums and inner products of 16- and 32-bit numbers as they lie in memory, a long run in one call, without torch.

Numbers are given by address, so that any number of tensors, of either width, is one kind of argument: a run of each is
float32 (4 bytes wide) or bfloat16 (2 bytes), its upper half. Calls are few and long because a thread that returns from
one waits for the interpreter. The operations and their order are those of `mergekit_ray.methods.accumulate`, bit for
bit: products are added fused, as torch does it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.np.numpy_support import carray

from mergekit_ray.methods.compiled.half_loops import (
    WIDTH,
    change_fused,
    change_rounded,
    from_first,
    from_second,
    held,
    sum_fused,
    sum_rounded,
)
from mergekit_ray.methods.compiled.intrinsics import (
    LANES,
    add_pairs_of_three,
    add_pairs_of_three_changes,
    add_pairs_of_three_halves,
    add_pairs_of_two,
    add_pairs_of_two_changes,
    add_pairs_of_two_halves,
    add_products,
    float32_of,
    fma,
    pointer_to,
    uint32_of,
)
from mergekit_ray.methods.compiled.jit import compiled

Addresses = np.ndarray[Any, np.dtype[np.int64]]
Widths = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float32]]
Doubles = np.ndarray[Any, np.dtype[np.float64]]

Place = tuple[int, int]
"""The address of the first element of a run, and the bytes of an element."""

Steps = tuple[bool, np.float32, np.float32]
"""Whether products are rounded before they are added (otherwise they are added fused); what the sum is divided by, and
what it is multiplied with then: 1 to leave that out."""

_EXPONENT = np.uint32(0x7F800000)
_UPPER_EXPONENT = np.uint32(0x7F80)
_MAGNITUDE = np.uint32(0x7FFFFFFF)
_LARGEST_ROUNDED = np.uint32(0x7F7F7FFF)
"""Above are NaN, infinity, and what is rounded to a bfloat16 infinity."""
_HALF = np.uint32(0x7FFF)
_ONE = np.uint32(1)
_SIXTEEN = np.uint32(16)

BLOCK = 1 << 9
"""Elements handled at a time: a few such runs stay in the nearest cache of a core. A multiple of `LANES`."""


@compiled
def weighted_sum(
    addresses: Addresses, widths: Widths, base: Place, factors: Floats, steps: Steps, out: Place, size: int
) -> bool:
    """``scale · (Σ factor_i v_i) / divisor``; where it is of changes ``x_i - base``, the base is added.

    Args:
        addresses: of the first element of each input's run.
        widths: of the inputs' elements, bytes.
        base: where its run is; address 0 without a base.
        factors: one per input.
        steps: how else.
        out: where as many elements go.
        size: elements.

    Returns:
        Whether the sum is finite, and still is as it was stored.
    """
    base_address, base_width = base
    out_address, out_width = out
    block = min(BLOCK, size)
    total_block, origin_block, x_block = (
        np.empty(block, np.float32),
        np.empty(block, np.float32),
        np.empty(block, np.float32),
    )
    first, is_finite = 0, True
    if out_width == 2 and (base_address == 0 or base_width == 2) and (widths == 2).all():
        num_steps = size // WIDTH
        largest = _sum_of_halves(addresses, base_address, factors, steps, out_address, num_steps)
        first, is_finite = num_steps * WIDTH, bool(largest <= _LARGEST_ROUNDED)
    for start in range(first, size, BLOCK):
        length = min(BLOCK, size - start)
        total, origin, x = total_block[:length], origin_block[:length], x_block[:length]
        if base_address != 0:
            read(base_address + start * base_width, base_width, origin)
        for k in range(addresses.size):
            if base_address != 0:
                read_change(addresses[k] + start * widths[k], widths[k], origin, x)
            else:
                read(addresses[k] + start * widths[k], widths[k], x)
            add_term(x, factors[k], k == 0, steps, total)
        finish(total, steps)
        if base_address != 0:
            add(origin, total)
        is_finite &= store(total, out_address + start * out_width, out_width)
    return is_finite


@compiled
def _sum_of_halves(addresses: Addresses, base: int, factors: Floats, steps: Steps, out: int, num_steps: int) -> Any:
    """`weighted_sum` of bfloat16 numbers to such; the largest magnitude."""
    rounds_products, divisor, scale = steps
    table, numbers, number = addresses.ctypes.data, factors.ctypes.data, addresses.size
    if base != 0:
        if rounds_products:
            return change_rounded(table, base, numbers, number, divisor, scale, out, num_steps)
        return change_fused(table, base, numbers, number, divisor, scale, out, num_steps)
    if rounds_products:
        return sum_rounded(table, base, numbers, number, divisor, scale, out, num_steps)
    return sum_fused(table, base, numbers, number, divisor, scale, out, num_steps)


@compiled
def of_two(addresses: Addresses, widths: Widths, holds: bool, t: np.float32, out: Place, size: int) -> bool:
    """``a + t (b - a)`` of two tensors, or ``b`` held within ``a ± t``.

    Args:
        addresses: of the first element of each tensor's run.
        widths: of their elements, bytes.
        holds: the latter.
        t: see above.
        out: where as many elements go.
        size: elements.

    Returns:
        Whether the tensors and the result are finite, and it still is as it was stored.
    """
    out_address, out_width = out
    block = min(BLOCK, size)
    a_block, b_block = np.empty(block, np.float32), np.empty(block, np.float32)
    first, is_finite = 0, True
    if out_width == 2 and (widths == 2).all():
        num_steps = size // WIDTH
        largest = _of_two_halves(addresses[0], addresses[1], holds, t, out_address, num_steps)
        first, is_finite = num_steps * WIDTH, bool(largest <= _LARGEST_ROUNDED)
    for start in range(first, size, BLOCK):
        length = min(BLOCK, size - start)
        a, b = a_block[:length], b_block[:length]
        read(addresses[0] + start * widths[0], widths[0], a)
        read(addresses[1] + start * widths[1], widths[1], b)
        is_finite &= all_finite_floats(a) and all_finite_floats(b)
        if holds:
            _hold(a, b, t)
        else:
            _interpolate(a, b, t)
        is_finite &= store(a, out_address + start * out_width, out_width)
    return is_finite


@compiled
def _of_two_halves(a: int, b: int, holds: bool, t: np.float32, out: int, num_steps: int) -> Any:
    """`of_two` of bfloat16 numbers to such; the largest magnitude."""
    if holds:
        return held(a, b, t, out, num_steps)
    if abs(t) < np.float32(0.5):
        return from_first(a, b, t, out, num_steps)
    return from_second(a, b, np.float32(t - np.float32(1.0)), out, num_steps)


@compiled
def all_finite(address: int, width: int, size: int) -> bool:
    """Whether no number of a run is a NaN or an infinity."""
    spoiled = np.uint32(0)
    if width == 2:
        bits = carray(pointer_to(address), size, np.uint16)
        for i in range(size):
            spoiled |= np.uint32((bits[i] & _UPPER_EXPONENT) == _UPPER_EXPONENT)
    else:
        words = carray(pointer_to(address), size, np.uint32)
        for i in range(size):
            spoiled |= np.uint32((words[i] & _EXPONENT) == _EXPONENT)
    return bool(spoiled == 0)


@compiled
def all_finite_floats(x: Floats) -> bool:
    """Whether no number is a NaN or an infinity."""
    largest = np.uint32(0)
    for i in range(x.size):
        largest = max(largest, np.uint32(uint32_of(x[i]) & _MAGNITUDE))
    return bool(largest < _EXPONENT)


@compiled
def inner_products(addresses: Addresses, widths: Widths, base: Place, size: int, part: int, found: Doubles) -> None:
    """Partial sums of ``Σ x_i y_i`` of each pair of tensors, or of their changes ``x - base``, as `dot` has them.

    Args:
        addresses: of the first element of each tensor's run.
        widths: bytes.
        base: where its run is; address 0 without a base.
        size: elements.
        part: elements in a partial sum, a multiple of 512.
        found: filled with ``[parts, pairs]``, pairs ``i <= j`` row by row of the upper triangle.
    """
    base_address, base_width = base
    number = addresses.size
    block = min(BLOCK, size)
    origin_block, runs = np.empty(block, np.float32), np.empty((number, block), np.float32)
    lanes = np.empty((found.shape[1], LANES))
    are_halves = number in (2, 3) and (base_address == 0 or base_width == 2) and (widths == 2).all()
    for index in range(found.shape[0]):
        lanes[:] = 0.0
        first, last = index * part, min((index + 1) * part, size)
        if are_halves:
            num_rounds = (last - first) // LANES
            _add_pairs_of_halves(addresses, base_address, first, num_rounds, lanes)
            first += num_rounds * LANES
        for start in range(first, last, BLOCK):
            length = min(BLOCK, last - start)
            if base_address != 0:
                read(base_address + start * base_width, base_width, origin_block[:length])
            for k in range(number):
                if base_address != 0:
                    read_change(addresses[k] + start * widths[k], widths[k], origin_block[:length], runs[k, :length])
                else:
                    read(addresses[k] + start * widths[k], widths[k], runs[k, :length])
            _add_pairs(runs, length, lanes)
        for pair in range(found.shape[1]):
            found[index, pair] = lanes[pair].sum()


@compiled
def _add_pairs_of_halves(addresses: Addresses, base: int, start: int, num_rounds: int, lanes: Doubles) -> None:
    """`_add_pairs` of whole rounds of two or three runs of bfloat16 numbers, or of their changes."""
    table, place = addresses.ctypes.data, lanes.ctypes.data
    if addresses.size == 2:
        if base != 0:
            add_pairs_of_two_changes(table, base, start, num_rounds, place)
        else:
            add_pairs_of_two_halves(table, base, start, num_rounds, place)
    elif base != 0:
        add_pairs_of_three_changes(table, base, start, num_rounds, place)
    else:
        add_pairs_of_three_halves(table, base, start, num_rounds, place)


@compiled
def dot(x: Floats, y: Floats) -> float:
    """``Σ x_i y_i`` in float64, where products of float32 numbers are exact."""
    lanes = np.zeros(LANES)
    _add_products(x, y, lanes)
    return float(lanes.sum())


@compiled
def _add_products(x: Floats, y: Floats, lanes: Doubles) -> None:
    rounds = x.size // LANES
    add_products(x.ctypes.data, y.ctypes.data, rounds, lanes.ctypes.data)
    for i in range(rounds * LANES, x.size):
        lanes[0] += np.float64(x[i]) * np.float64(y[i])


@compiled
def _add_pairs(runs: Floats, length: int, lanes: Doubles) -> None:
    """`_add_products` of the first elements of all pairs of runs, two and three of them in one loop."""
    number, rounds = runs.shape[0], length // LANES
    if number == 2:
        add_pairs_of_two(runs.ctypes.data, runs.strides[0], rounds, lanes.ctypes.data)
    elif number == 3:
        add_pairs_of_three(runs.ctypes.data, runs.strides[0], rounds, lanes.ctypes.data)
    first = rounds * LANES if number in (2, 3) else 0
    pair = 0
    for i in range(number):
        for j in range(i, number):
            _add_products(runs[i, first:length], runs[j, first:length], lanes[pair])
            pair += 1


@compiled
def read(address: int, width: int, out: Floats) -> None:
    """As float32."""
    if width == 2:
        bits = carray(pointer_to(address), out.size, np.uint16)
        for i in range(out.size):
            out[i] = float32_of(np.uint32(np.uint32(bits[i]) << _SIXTEEN))
    else:
        words = carray(pointer_to(address), out.size, np.uint32)
        for i in range(out.size):
            out[i] = float32_of(words[i])


@compiled
def read_change(address: int, width: int, base: Floats, out: Floats) -> None:
    """As float32, without the base."""
    if width == 2:
        bits = carray(pointer_to(address), out.size, np.uint16)
        for i in range(out.size):
            out[i] = float32_of(np.uint32(np.uint32(bits[i]) << _SIXTEEN)) - base[i]
    else:
        words = carray(pointer_to(address), out.size, np.uint32)
        for i in range(out.size):
            out[i] = float32_of(words[i]) - base[i]


@compiled
def store(total: Floats, address: int, width: int) -> bool:
    """Rounded to bfloat16, to nearest and to even, or as it is; whether it and the result are all finite."""
    largest = np.uint32(0)
    if width == 2:
        upper_halves = carray(pointer_to(address), total.size, np.uint16)
        for i in range(total.size):
            bits = uint32_of(total[i])
            largest = max(largest, np.uint32(bits & _MAGNITUDE))
            upper_halves[i] = np.uint32((bits + _HALF + ((bits >> _SIXTEEN) & _ONE)) >> _SIXTEEN)
        return bool(largest <= _LARGEST_ROUNDED)
    words = carray(pointer_to(address), total.size, np.uint32)
    for i in range(total.size):
        whole = uint32_of(total[i])
        largest = max(largest, np.uint32(whole & _MAGNITUDE))
        words[i] = whole
    return bool(largest < _EXPONENT)


@compiled
def add_term(x: Floats, factor: np.float32, is_first: bool, steps: Steps, total: Floats) -> None:
    """``factor · x`` onto a sum, or as the first term of one."""
    if is_first:
        _multiply(x, factor, total)
    elif steps[0]:
        _add_rounded(x, factor, total)
    else:
        _add_fused(x, factor, total)


@compiled
def finish(total: Floats, steps: Steps) -> None:
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
def add(x: Floats, total: Floats) -> None:
    """``x`` onto a sum."""
    for i in range(x.size):
        total[i] += x[i]


@compiled
def _divide(total: Floats, divisor: np.float32) -> None:
    for i in range(total.size):
        total[i] /= divisor


@compiled
def _interpolate(a: Floats, b: Floats, t: np.float32) -> None:
    """From the nearer end, as ``torch.lerp`` has it; in place of ``a``."""
    if abs(t) < np.float32(0.5):
        for i in range(a.size):
            a[i] = fma(t, b[i] - a[i], a[i])
    else:
        back = np.float32(t - np.float32(1.0))
        for i in range(a.size):
            a[i] = fma(back, b[i] - a[i], b[i])


@compiled
def _hold(a: Floats, b: Floats, t: np.float32) -> None:
    """``b`` within ``a ± t``, where both are zero the bound; in place of ``a``."""
    for i in range(a.size):
        low, high = a[i] - t, a[i] + t
        least = max(low, b[i])
        a[i] = min(high, least)

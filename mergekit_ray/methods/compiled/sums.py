"""Sums of tensors, or of their changes, from the numbers in memory, a long run in one call, without torch.

Arguments are those of `mergekit_ray.methods.compiled.runs`. Calls are few and long because a thread that returns from
one waits for the interpreter. The operations and their order are those of `methods.shared.accumulate`, bit for bit:
products are added fused, as torch does it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mergekit_ray.methods.compiled.half_loops import (
    WIDTH,
    change_fused,
    change_rounded,
    clamped,
    from_first,
    from_second,
    sum_fused,
    sum_rounded,
)
from mergekit_ray.methods.compiled.intrinsics import fma
from mergekit_ray.methods.compiled.jit import compiled
from mergekit_ray.methods.compiled.runs import (
    BLOCK,
    LARGEST_ROUNDED,
    Addresses,
    Floats,
    Place,
    Widths,
    all_finite_floats,
    read,
    read_change,
    store,
)

Steps = tuple[bool, np.float32, np.float32]
"""Whether products are rounded before they are added (otherwise they are added fused); what the sum is divided by, and
what it is multiplied with then: 1 to leave that out."""


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
        first, is_finite = num_steps * WIDTH, bool(largest <= LARGEST_ROUNDED)
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
    """``a + t (b - a)`` of two tensors, or ``b`` clamped to ``a ± t``.

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
        first, is_finite = num_steps * WIDTH, bool(largest <= LARGEST_ROUNDED)
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
        return clamped(a, b, t, out, num_steps)
    if abs(t) < np.float32(0.5):
        return from_first(a, b, t, out, num_steps)
    return from_second(a, b, np.float32(t - np.float32(1.0)), out, num_steps)


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

"""Inner products of tensors, or of their changes, from the numbers in memory, without torch.

Arguments are those of `mergekit_ray.methods.compiled.runs`. Products of float32 numbers are exact in float64.
"""

from __future__ import annotations

import numpy as np

from mergekit_ray.methods.compiled.intrinsics import (
    LANES,
    add_pairs_of_three,
    add_pairs_of_three_changes,
    add_pairs_of_three_halves,
    add_pairs_of_two,
    add_pairs_of_two_changes,
    add_pairs_of_two_halves,
    add_products,
)
from mergekit_ray.methods.compiled.jit import compiled
from mergekit_ray.methods.compiled.runs import (
    BLOCK,
    Addresses,
    Doubles,
    Floats,
    Place,
    Widths,
    read,
    read_change,
)


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

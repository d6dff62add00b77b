"""Orthogonal matching pursuit on the CPU: which atoms, and how much of each.

Atoms are rows of a matrix in memory, float32 or bfloat16. Everything that decides something is done here, row by row in
float64 and in one order, so that the result does not depend on what else is computed at the same time.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

from mergekit_ray.methods.compiled.intrinsics import add_products
from mergekit_ray.methods.compiled.jit import compiled
from mergekit_ray.methods.compiled.products import LANES
from mergekit_ray.methods.compiled.runs import Doubles, Floats, read

Integers = np.ndarray[Any, np.dtype[np.int64]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]

Place = tuple[int, int, int]
"""Of a matrix: the address of its first element, the bytes of an element, the elements of a row."""

TOO_MANY: Final = -1
"""In place of a number of candidates: there are more than there was room for."""

_DEPENDENT: Final = 1e-12
"""An atom whose squared part outside of those chosen is below this share of its square adds nothing."""

_EXACT: Final = 2.0**-24
"""A residual of this share of the row is float32's rounding."""


class Candidates(NamedTuple):
    """The atoms that may be the best for each of some rows.

    Attributes:
        errors: of the products of each row.
        largest: magnitude so far.
        counts: how many candidates there are; `TOO_MANY` for more than there is room for.
        indices: of the candidates, ascending.
        magnitudes: of their products.
    """

    errors: Doubles
    largest: Doubles
    counts: Integers
    indices: Integers
    magnitudes: Doubles


class Solutions(NamedTuple):
    """The atoms that were chosen for each of some rows, and how much of each.

    Attributes:
        factors: Cholesky factor of the chosen atoms' Gram matrix, ``[rows, atoms, atoms]``.
        right: the row's products with the chosen atoms.
        picked: the chosen atoms.
        coefficients: of each.
        sizes: how many were chosen.
        active: whether there may be more.
    """

    factors: Doubles
    right: Doubles
    picked: Integers
    coefficients: Doubles
    sizes: Integers
    active: Flags


@compiled
def dot(x: Floats, y: Floats) -> float:
    """``Σ x_i y_i`` in float64, where products of float32 numbers are exact."""
    lanes = np.zeros(LANES)
    rounds = x.size // LANES
    add_products(x.ctypes.data, y.ctypes.data, rounds, lanes.ctypes.data)
    for i in range(rounds * LANES, x.size):
        lanes[0] += np.float64(x[i]) * np.float64(y[i])
    return float(lanes.sum())


@compiled
def _elements(place: Place) -> int:
    return place[2]


@compiled
def _read(place: Place, index: int, out: Floats) -> None:
    address, width, elements = place
    read(address + index * elements * width, width, out)


@compiled
def squares(place: Place, out: Doubles) -> None:
    """The squared norm of each of the first rows of a matrix."""
    row = np.empty(_elements(place), np.float32)
    for i in range(out.size):
        _read(place, i, row)
        out[i] = dot(row, row)


@compiled
def products(place: Place, indices: Integers, x: Floats, out: Doubles) -> None:
    """The inner product of some rows of a matrix with ``x``."""
    row = np.empty(x.size, np.float32)
    for i in range(indices.size):
        _read(place, indices[i], row)
        out[i] = dot(row, x)


@compiled
def scan(found: Floats, first: int, share: float, candidates: Candidates) -> None:
    """Note which atoms may have the largest product, by magnitude, where products are known up to an error.

    If ``p`` is a product and ``q`` what is known of it, ``|p − q| <= error + share · |p|``.

    Args:
        found: products with some consecutive atoms, ``[rows, atoms]``.
        first: the index of the first of them.
        share: the same for all, well below 1.
        candidates: of each row; updated.
    """
    room = candidates.indices.shape[1]
    for i in range(found.shape[0]):
        count, top = candidates.counts[i], candidates.largest[i]
        if count == TOO_MANY:
            continue
        indices, magnitudes = candidates.indices[i], candidates.magnitudes[i]
        least = top * (1.0 - 2.0 * share) - 2.0 * candidates.errors[i]
        for j in range(found.shape[1]):
            magnitude = abs(np.float64(found[i, j]))
            if magnitude < least:
                continue
            if magnitude > top:
                top = magnitude
                least = top * (1.0 - 2.0 * share) - 2.0 * candidates.errors[i]
            if count == room:
                count = _kept(indices, magnitudes, least)
                if count == room:
                    count = TOO_MANY
                    break
            indices[count], magnitudes[count] = first + j, magnitude
            count += 1
        candidates.counts[i], candidates.largest[i] = count, top


@compiled
def _kept(candidates: Integers, magnitudes: Doubles, least: float) -> int:
    """Drop candidates whose magnitude is less; how many are left."""
    count = 0
    for i in range(candidates.size):
        if magnitudes[i] >= least:
            candidates[count], magnitudes[count] = candidates[i], magnitudes[i]
            count += 1
    return count


@compiled
def choose(place: Place, num_atoms: int, residuals: Floats, share: float, candidates: Candidates) -> Integers:
    """Of each row the atom with the largest product, the first of equals; -1 where all are zero or there is none.

    All atoms are looked at where there were too many candidates, or where one's product turns out to be off by more
    than it may.

    Args:
        place: of the atoms.
        num_atoms: all that there are.
        residuals: ``[rows, elements]``.
        share: see `scan`.
        candidates: of each row.
    """
    chosen = np.full(residuals.shape[0], -1)
    for i in range(residuals.shape[0]):
        count, is_as_said = candidates.counts[i], candidates.counts[i] != TOO_MANY
        if is_as_said:
            indices, magnitudes = candidates.indices[i, :count], candidates.magnitudes[i, :count]
            chosen[i], is_as_said = _best(place, residuals[i], indices, magnitudes, candidates.errors[i], share)
        if not is_as_said:
            chosen[i] = _best_of_all(place, num_atoms, residuals[i])
    return chosen


@compiled
def extend(place: Place, targets: Floats, residuals: Floats, chosen: Integers, solutions: Solutions) -> None:
    """Add the chosen atom of each row that is not finished, and solve for all of its atoms.

    Args:
        place: of the atoms.
        targets: what is approximated, ``[rows, elements]``.
        residuals: what is left of it; updated.
        chosen: of each row; -1 finishes it, and so does an atom in the span of those that it has.
        solutions: updated.
    """
    row, rest = np.empty(targets.shape[1], np.float32), np.empty(targets.shape[1], np.float64)
    for i in range(targets.shape[0]):
        if not solutions.active[i]:
            continue
        factor, picked, size = solutions.factors[i], solutions.picked[i], solutions.sizes[i]
        if chosen[i] < 0 or not _extend(place, chosen[i], factor, picked, size):
            solutions.active[i] = False
            continue
        _read(place, chosen[i], row)
        picked[size], solutions.right[i, size] = chosen[i], dot(row, targets[i])
        size += 1
        solutions.sizes[i] = size
        _solve(factor, solutions.right[i], solutions.coefficients[i], size)
        for e in range(row.size):
            rest[e] = np.float64(targets[i, e])
        _add(place, picked, solutions.coefficients[i], size, -1.0, rest)
        for e in range(row.size):
            residuals[i, e] = np.float32(rest[e])
        solutions.active[i] = dot(residuals[i], residuals[i]) > _EXACT**2 * dot(targets[i], targets[i])


@compiled
def _best(
    place: Place, x: Floats, indices: Integers, magnitudes: Doubles, error: float, share: float
) -> tuple[int, bool]:
    """The candidate with the largest product, -1 if all are zero; and whether all are known as they should be."""
    row = np.empty(x.size, np.float32)
    chosen, largest, is_as_said = -1, 0.0, True
    for c in range(indices.size):
        _read(place, indices[c], row)
        product = abs(dot(row, x))
        if abs(product - magnitudes[c]) > error + share * product:
            is_as_said = False
        if product > largest:
            chosen, largest = indices[c], product
    return chosen, is_as_said


@compiled
def _best_of_all(place: Place, num_atoms: int, x: Floats) -> int:
    """The atom with the largest product, -1 if all are zero."""
    row = np.empty(x.size, np.float32)
    chosen, largest = -1, 0.0
    for index in range(num_atoms):
        _read(place, index, row)
        product = abs(dot(row, x))
        if product > largest:
            chosen, largest = index, product
    return chosen


@compiled
def _extend(place: Place, index: int, factor: Doubles, picked: Integers, size: int) -> bool:
    """Add an atom to the Cholesky factor of the Gram matrix of chosen ones; False if it is in their span."""
    row, other = np.empty(_elements(place), np.float32), np.empty(_elements(place), np.float32)
    _read(place, index, row)
    square = dot(row, row)
    left = square
    for s in range(size):
        _read(place, picked[s], other)
        value = dot(other, row)
        for t in range(s):
            value -= factor[s, t] * factor[size, t]
        value /= factor[s, s]
        factor[size, s] = value
        left -= value * value
    if left <= _DEPENDENT * square:
        return False
    factor[size, size] = np.sqrt(left)
    return True


@compiled
def _solve(factor: Doubles, right: Doubles, out: Doubles, size: int) -> None:
    """Solve ``L Lᵀ out = right`` for the first ``size`` unknowns."""
    for s in range(size):
        value = right[s]
        for t in range(s):
            value -= factor[s, t] * out[t]
        out[s] = value / factor[s, s]
    for s in range(size - 1, -1, -1):
        value = out[s]
        for t in range(s + 1, size):
            value -= factor[t, s] * out[t]
        out[s] = value / factor[s, s]


@compiled
def combine(place: Place, picked: Integers, coefficients: Doubles, sizes: Integers, out: Floats) -> None:
    """Weighted sums of rows of a matrix, added in float64 in their order.

    Args:
        place: of the matrix.
        picked: which rows, ``[rows, most]``.
        coefficients: of each.
        sizes: how many count in each row.
        out: ``[rows, elements]``.
    """
    total = np.empty(out.shape[1], np.float64)
    for i in range(out.shape[0]):
        total[:] = 0.0
        _add(place, picked[i], coefficients[i], sizes[i], 1.0, total)
        for e in range(total.size):
            out[i, e] = np.float32(total[e])


@compiled
def _add(place: Place, picked: Integers, coefficients: Doubles, size: int, sign: float, total: Doubles) -> None:
    row = np.empty(total.size, np.float32)
    for s in range(size):
        _read(place, picked[s], row)
        factor = sign * coefficients[s]
        for e in range(total.size):
            total[e] += factor * np.float64(row[e])


@compiled
def transform(x: Doubles, matrix: Doubles, shift: Doubles, out: Floats) -> None:
    """``x @ matrix + shift``, each row added up in float64 from its first element on.

    Args:
        x: ``[rows, inner]``.
        matrix: ``[inner, elements]``.
        shift: ``[elements]``.
        out: ``[rows, elements]``.
    """
    total = np.empty((x.shape[0], matrix.shape[1]))
    for i in range(x.shape[0]):
        total[i] = shift
    for t in range(matrix.shape[0]):
        for i in range(x.shape[0]):
            factor = x[i, t]
            for e in range(matrix.shape[1]):
                total[i, e] += factor * matrix[t, e]
    for i in range(x.shape[0]):
        for e in range(matrix.shape[1]):
            out[i, e] = np.float32(total[i, e])

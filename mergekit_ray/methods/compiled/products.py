"""Inner products of tensors, or of their changes, from the numbers in memory, without torch.

Products of float32 numbers are exact in float64, so whether they are fused with the sums or not makes no difference.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from mergekit_ray.core.dtypes import DType
from mergekit_ray.methods.compiled.native import Body, loaded_addresses, native, turns

Addresses = np.ndarray[Any, np.dtype[np.int64]]
Doubles = np.ndarray[Any, np.dtype[np.float64]]

LANES: Final = 32
"""Independent partial sums: as many as an ordinary processor has room for in registers. Part of the result: the same
everywhere."""

_PART: Final = 8
"""Lanes that are one vector."""

_PAIRS: Final = 6
"""Pairs at a time: their lanes fill the registers. Those of three tensors are as many."""

_BLOCK: Final = 1 << 13
"""Elements that are gone over once for so many pairs, while they are in cache."""


def inner_products(
    addresses: Addresses, dtypes: Sequence[DType], size: int, part: int, *, has_base: bool = False
) -> Doubles:
    """Partial sums of ``Σ x_i y_i`` of each pair of tensors, or of their changes ``x - base``.

    Element ``i`` of a part goes to lane ``i % LANES``, and what whole rounds leave to the first lane. The lanes are
    added in order.

    Args:
        addresses: of the first element of each tensor's run, the base's last.
        dtypes: of these.
        size: elements.
        part: elements in a partial sum, a multiple of `LANES`.
        has_base: the last one is the base.

    Returns:
        ``[parts, pairs]``, pairs ``i <= j`` row by row of the upper triangle.
    """
    pairs = list(itertools.combinations_with_replacement(range(len(dtypes) - has_base), 2))
    sizes = np.array([dtype.itemsize for dtype in dtypes], np.int64)
    add = _adder(tuple(pairs), tuple(dtypes), has_base)
    block = part if len(pairs) <= _PAIRS else min(part, _BLOCK)
    lanes = np.zeros((-(-size // part), len(pairs), LANES))
    starts = [
        (index, start)
        for index in range(lanes.shape[0])
        for start in range(index * part, min((index + 1) * part, size), block)
    ]
    places = addresses + np.array([start for _, start in starts], np.int64)[:, np.newaxis] * sizes
    table, table_row, first_lane, lanes_row = places.ctypes.data, places.strides[0], lanes.ctypes.data, lanes.strides[0]
    for row, (index, start) in enumerate(starts):
        stop = min(start + block, (index + 1) * part, size)
        add(table + row * table_row, first_lane + index * lanes_row, stop - start)
    found: Doubles = np.add.accumulate(lanes, axis=2)[:, :, -1]
    return found


@functools.cache
def _adder(pairs: Sequence[tuple[int, int]], dtypes: Sequence[DType], has_base: bool) -> Any:
    """What adds the products of a run to lanes, given where the addresses and the lanes are, and how many elements."""
    return native(_source(pairs, dtypes, has_base=has_base), None, *[ctypes.c_void_p] * 2, ctypes.c_int64)


def _source(pairs: Sequence[tuple[int, int]], dtypes: Sequence[DType], *, has_base: bool) -> str:
    """The function: for a few pairs at a time whole rounds of `LANES` elements, then what is left, one by one."""
    numbers = itertools.count()
    lines = ["define void @loop(ptr %addresses, ptr %lanes, i64 %size) {", "entry:"]
    lines += loaded_addresses(len(dtypes))
    lines += [f"  %whole = and i64 %size, -{LANES}", "  br label %g0"]
    groups = [dict(list(enumerate(pairs))[i : i + _PAIRS]) for i in range(0, len(pairs), _PAIRS)]
    num_loops = 2 * len(groups)
    for number, group in enumerate(groups):
        for place, (width, num_parts, bounds) in enumerate(
            ((_PART, LANES // _PART, ("0", "%whole")), (1, 1, ("%whole", "%size")))
        ):
            name = f"g{2 * number + place}"
            body = Body(width, numbers)
            summed = _summed(body, name, group, num_parts, dtypes, has_base=has_base)
            lines += _looped(body, name, num_parts, bounds, summed)
            lines.append(f"  br label %g{2 * number + place + 1}")
    return "\n".join([*lines, f"g{num_loops}:", "  ret void", "}"])


def _summed(
    body: Body, name: str, group: dict[int, tuple[int, int]], num_parts: int, dtypes: Sequence[DType], *, has_base: bool
) -> dict[tuple[int, int], str]:
    """Emit a round; returns the lanes then, by pair and part."""
    wide, summed = body.vector("double"), {}
    used = sorted({i for pair in group.values() for i in pair})
    for part in range(num_parts):
        index = body.made(f"add i64 %{name}.i, {part * body.width}")
        base = body.load(f"%a{len(dtypes) - 1}", index, dtypes[-1]) if has_base else None
        xs = {}
        for i in used:
            x = body.load(f"%a{i}", index, dtypes[i])
            x = x if base is None else body.made(f"fsub {body.floats} {x}, {base}")
            xs[i] = body.made(f"fpext {body.floats} {x} to {wide}")
        for pair, (i, j) in group.items():
            product = body.made(f"fmul contract {wide} {xs[i]}, {xs[j]}")
            summed[pair, part] = body.made(f"fadd contract {wide} %{name}.l{pair}.{part}, {product}")
    return summed


def _looped(
    body: Body,
    name: str,
    num_parts: int,
    bounds: tuple[str, str],
    summed: dict[tuple[int, int], str],
) -> list[str]:
    """A body from a first element on to a last one, between reading the lanes and writing them."""
    wide = body.vector("double")
    lines, carried = [f"{name}:"], {}
    for (pair, part), value in summed.items():
        place, before = f"%{name}.p{pair}.{part}", f"%{name}.b{pair}.{part}"
        lines.append(f"  {place} = getelementptr double, ptr %lanes, i64 {pair * LANES + part * body.width}")
        lines.append(f"  {before} = load {wide}, ptr {place}, align 8")
        carried[f"l{pair}.{part}"] = (wide, before, value)
    lines += turns(body, name, body.width * num_parts, bounds, carried)
    for pair, part in summed:
        lines.append(f"  store {wide} %{name}.l{pair}.{part}.end, ptr %{name}.p{pair}.{part}, align 8")
    return lines

"""What numba has no names for: fused products, numbers by their bits, memory by its address; and one loop."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic


def _fused(_typing: Any, a: Any, _b: Any, _c: Any) -> Any:
    return a(a, a, a), lambda _context, builder, _signature, args: builder.fma(*args)


def _cast(result: Any) -> Any:
    def cast(_typing: Any, value: Any) -> Any:
        return result(value), lambda context, builder, _, args: builder.bitcast(args[0], context.get_value_type(result))

    return cast


fma: Any = intrinsic(_fused)
"""``a * b + c`` of three numbers of one floating dtype, rounded once (IEEE 754-2019, 5.4.1)."""

float32_of: Any = intrinsic(_cast(types.float32))
"""The float32 with the bits of a uint32."""

uint32_of: Any = intrinsic(_cast(types.uint32))
"""The bits of a float32, as a uint32."""

float64_of: Any = intrinsic(_cast(types.float64))
"""The float64 with the bits of an int64."""

int64_of: Any = intrinsic(_cast(types.int64))
"""The bits of a float64, as an int64."""


def _to_pointer(_typing: Any, address: Any) -> Any:
    return types.voidptr(address), lambda context, builder, _, args: builder.inttoptr(
        args[0], context.get_value_type(types.voidptr)
    )


pointer_to: Any = intrinsic(_to_pointer)
"""The memory at an address, for `numba.carray`."""


LANES: Final = 32
"""Independent partial sums of `add_products`: as many as an ordinary processor has room for in registers. Part of the
result: the same everywhere."""


_PART: Final = 8
"""Lanes that are one vector."""

_NARROW: Final = ir.VectorType(ir.FloatType(), _PART)


def _to_add_products(_typing: Any, x: Any, y: Any, number: Any, lanes: Any) -> Any:
    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> None:
        _emit_products(builder, _singles(builder, args[:2]), [(0, 1)], args[2], args[3])

    return types.void(x, y, number, lanes), emit


def _to_add_pairs(num_runs: int) -> Any:
    def to_add_pairs(_typing: Any, first: Any, stride: Any, number: Any, lanes: Any) -> Any:
        def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> None:
            runs = [args[0]]
            for _ in range(1, num_runs):
                runs.append(builder.add(runs[-1], args[1]))
            _emit_products(builder, _singles(builder, runs), _all_pairs(num_runs), args[2], args[3])

        return types.void(first, stride, number, lanes), emit

    return to_add_pairs


def _to_add_pairs_of_halves(num_runs: int, *, has_base: bool) -> Any:
    def to_add_pairs(_typing: Any, addresses: Any, base: Any, start: Any, number: Any, lanes: Any) -> Any:
        def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> None:
            addresses, base, start, number, lanes = args
            offset = builder.mul(start, start.type(2))
            table = builder.inttoptr(addresses, base.type.as_pointer())
            runs = [builder.load(builder.gep(table, [base.type(k)])) for k in range(num_runs)]
            origins = [builder.add(base, offset)] if has_base else []
            read = _halves(builder, [builder.add(run, offset) for run in runs], origins)
            _emit_products(builder, read, _all_pairs(num_runs), number, lanes)

        return types.void(addresses, base, start, number, lanes), emit

    return to_add_pairs


def _all_pairs(num_runs: int) -> list[tuple[int, int]]:
    return list(itertools.combinations_with_replacement(range(num_runs), 2))


def _singles(builder: Any, runs: Sequence[Any]) -> Callable[[Any], list[Any]]:
    """What reads `_PART` numbers of each run of float32."""
    pointers = [builder.inttoptr(run, _NARROW.as_pointer()) for run in runs]

    def read(at: Any) -> list[Any]:
        return [builder.load(builder.gep(pointer, [at]), align=4) for pointer in pointers]

    return read


def widened(builder: Any, pointer: Any, at: Any, width: int) -> Any:
    """Emit what reads ``width`` bfloat16 numbers, so many times ``at`` from a pointer to as many, as float32."""
    words = ir.VectorType(ir.IntType(32), width)
    halves = builder.load(builder.gep(pointer, [at]), align=2)
    shifted = builder.shl(builder.zext(halves, words), ir.Constant(words, [16] * width))
    return builder.bitcast(shifted, ir.VectorType(ir.FloatType(), width))


def _halves(builder: Any, runs: Sequence[Any], origins: Sequence[Any]) -> Callable[[Any], list[Any]]:
    """What reads `_PART` numbers of each run of bfloat16 as float32, without those of an origin if there is one."""
    kind = ir.VectorType(ir.IntType(16), _PART).as_pointer()
    pointers = [builder.inttoptr(run, kind) for run in (*runs, *origins)]

    def read(at: Any) -> list[Any]:
        numbers = [widened(builder, pointer, at, _PART) for pointer in pointers]
        return [builder.fsub(x, numbers[-1]) for x in numbers[:-1]] if origins else numbers

    return read


def _emit_products(
    builder: Any, read: Callable[[Any], list[Any]], pairs: Sequence[tuple[int, int]], number: Any, lanes: Any
) -> None:
    """The loop, in LLVM's language, since the sums that numba's own keep in an array are stored at each step.

    Each number is made a float64 once, whatever pairs it is in: that is what takes the time.

    Args:
        builder: where it goes.
        read: emits what reads `_PART` float32 numbers of each run, given how many such parts in.
        pairs: of runs.
        number: of rounds of `LANES` elements.
        lanes: address of the first lane of the first pair.
    """
    wide = ir.VectorType(ir.DoubleType(), _PART)
    index_type = number.type
    num_parts = LANES // _PART
    lane_pointer = builder.inttoptr(lanes, wide.as_pointer())
    places = [builder.gep(lane_pointer, [index_type(i)]) for i in range(len(pairs) * num_parts)]
    before = builder.block
    first = [builder.load(place, align=8) for place in places]
    loop, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
    builder.cbranch(builder.icmp_signed(">", number, index_type(0)), loop, after)
    builder.position_at_end(loop)
    index = builder.phi(index_type)
    totals = [builder.phi(wide) for _ in places]
    summed = list(totals)
    for part in range(num_parts):
        at = builder.add(builder.mul(index, index_type(num_parts)), index_type(part))
        x = [builder.fpext(part_of_run, wide) for part_of_run in read(at)]
        for pair, (i, j) in enumerate(pairs):
            k = pair * num_parts + part
            product = builder.fmul(x[i], x[j], flags=("contract",))
            summed[k] = builder.fadd(totals[k], product, flags=("contract",))
    following = builder.add(index, index_type(1))
    builder.cbranch(builder.icmp_signed("<", following, number), loop, after)
    for phi, at_first, later in ((index, index_type(0), following), *zip(totals, first, summed, strict=True)):
        phi.add_incoming(at_first, before)
        phi.add_incoming(later, loop)
    builder.position_at_end(after)
    found = [builder.phi(wide) for _ in places]
    for phi, at_first, later in zip(found, first, summed, strict=True):
        phi.add_incoming(at_first, before)
        phi.add_incoming(later, loop)
    for phi, place in zip(found, places, strict=True):
        builder.store(phi, place, align=8)


add_products: Any = intrinsic(_to_add_products)
"""Add the products of two runs of float32 to float64 lanes, where they are exact: element ``i`` to lane ``i % LANES``.

Arguments are addresses and a number: of the runs' first elements, of whole rounds of `LANES` elements, of the lanes.
"""

add_pairs_of_two: Any = intrinsic(_to_add_pairs(2))
"""`add_products` of every pair of two runs, each with itself and with the other, to as many rows of lanes.

Arguments are the address of the first run, how many bytes further each next one is, whole rounds, and the address of
the first row of lanes. Pairs are ``i <= j``, row by row of the upper triangle.
"""

add_pairs_of_three: Any = intrinsic(_to_add_pairs(3))
"""The same for three runs, of which there are six pairs: as many lanes as an ordinary processor's registers hold."""

add_pairs_of_two_halves: Any = intrinsic(_to_add_pairs_of_halves(2, has_base=False))
"""`add_pairs_of_two` of runs of bfloat16 in memory.

Arguments are the address of the runs' addresses (int64), the address of a base, which element begins, whole rounds, and
the address of the first row of lanes.
"""

add_pairs_of_three_halves: Any = intrinsic(_to_add_pairs_of_halves(3, has_base=False))
"""The same for three runs."""

add_pairs_of_two_changes: Any = intrinsic(_to_add_pairs_of_halves(2, has_base=True))
"""`add_pairs_of_two_halves` of what runs differ from the base by, in float32."""

add_pairs_of_three_changes: Any = intrinsic(_to_add_pairs_of_halves(3, has_base=True))
"""The same for three runs."""

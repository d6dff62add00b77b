"""What numba has no names for: fused products, numbers by their bits, memory by its address; and one loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mergekit_ray.methods.compiled.products import LANES


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


_PART: Final = 8
"""Lanes that are one vector."""

_NARROW: Final = ir.VectorType(ir.FloatType(), _PART)


def _to_add_products(_typing: Any, x: Any, y: Any, number: Any, lanes: Any) -> Any:
    def emit(_context: Any, builder: Any, _signature: Any, args: Any) -> None:
        _emit_products(builder, _singles(builder, args[:2]), [(0, 1)], args[2], args[3])

    return types.void(x, y, number, lanes), emit


def _singles(builder: Any, runs: Sequence[Any]) -> Callable[[Any], list[Any]]:
    """What reads `_PART` numbers of each run of float32."""
    pointers = [builder.inttoptr(run, _NARROW.as_pointer()) for run in runs]

    def read(at: Any) -> list[Any]:
        return [builder.load(builder.gep(pointer, [at]), align=4) for pointer in pointers]

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

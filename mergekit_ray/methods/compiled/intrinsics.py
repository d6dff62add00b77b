"""What numba has no names for: fused products, numbers by their bits, memory by its address; and one loop."""

from __future__ import annotations

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


def _to_add_products(_typing: Any, x: Any, y: Any, number: Any, lanes: Any) -> Any:
    return types.void(x, y, number, lanes), _emit_add_products


def _emit_add_products(_context: Any, builder: Any, _signature: Any, args: Any) -> None:
    """The loop, in LLVM's language, since the sums that numba's own keep in an array are stored at each step."""
    narrow, wide = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.DoubleType(), LANES)
    index_type = args[2].type
    x, y = (builder.inttoptr(arg, narrow.as_pointer()) for arg in args[:2])
    lanes = builder.inttoptr(args[3], wide.as_pointer())
    before = builder.block
    first = builder.load(lanes, align=8)
    loop, after = builder.append_basic_block("loop"), builder.append_basic_block("after")
    builder.cbranch(builder.icmp_signed(">", args[2], index_type(0)), loop, after)
    builder.position_at_end(loop)
    index, total = builder.phi(index_type), builder.phi(wide)
    factors = (builder.fpext(builder.load(builder.gep(run, [index]), align=4), wide) for run in (x, y))
    summed = builder.fadd(total, builder.fmul(*factors, flags=("contract",)), flags=("contract",))
    following = builder.add(index, index_type(1))
    builder.cbranch(builder.icmp_signed("<", following, args[2]), loop, after)
    for phi, at_first, later in ((index, index_type(0), following), (total, first, summed)):
        phi.add_incoming(at_first, before)
        phi.add_incoming(later, loop)
    builder.position_at_end(after)
    found = builder.phi(wide)
    found.add_incoming(first, before)
    found.add_incoming(summed, loop)
    builder.store(found, lanes, align=8)


add_products: Any = intrinsic(_to_add_products)
"""Add the products of two runs of float32 to float64 lanes, where they are exact: element ``i`` to lane ``i % LANES``.

Arguments are addresses and a number: of the runs' first elements, of whole rounds of `LANES` elements, of the lanes.
"""

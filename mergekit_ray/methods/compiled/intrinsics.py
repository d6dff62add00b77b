"""What numba has no names for: fused products, and numbers by their bits."""

from __future__ import annotations

from typing import Any

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

"""Loops over bfloat16 numbers in memory, in LLVM's language.

A step of such a loop is `WIDTH` elements: they are widened to float32, combined, rounded and stored without leaving the
processor's registers. What numba makes of the same in Python goes through the cache at each operation. Operations and
their order are those of `mergekit_ray.methods.compiled.sums`, bit for bit, which calls these for whole steps.

Arguments that are memory are given by address. What is returned is the largest magnitude that was met, as the bits of a
float32: in the result before it is rounded, and, where it is of two tensors, in these.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mergekit_ray.methods.compiled.intrinsics import widened

WIDTH: Final = 16
"""Elements of a step."""

_INT16: Final = ir.VectorType(ir.IntType(16), WIDTH)
_INT32: Final = ir.VectorType(ir.IntType(32), WIDTH)
_FLOAT32: Final = ir.VectorType(ir.FloatType(), WIDTH)
_INDEX: Final = ir.IntType(64)


class _Emitter:
    """Emits operations on `WIDTH` numbers.

    Args:
        builder: where they go.
    """

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    @staticmethod
    def bits(value: int) -> Any:
        """An integer in all places."""
        return ir.Constant(_INT32, [value] * WIDTH)

    @staticmethod
    def number(value: float) -> Any:
        """A float32 in all places."""
        return ir.Constant(_FLOAT32, [value] * WIDTH)

    def filled(self, x: Any) -> Any:
        """A float32 that is known when it runs, in all places."""
        vector = self.builder.insert_element(ir.Constant(_FLOAT32, ir.Undefined), x, ir.IntType(32)(0))
        return self.builder.shuffle_vector(vector, ir.Constant(_FLOAT32, ir.Undefined), self.bits(0))

    def pointer(self, address: Any, kind: Any = _INT16) -> Any:
        """The memory at an address, by default as steps."""
        return self.builder.inttoptr(address, kind.as_pointer())

    def load(self, pointer: Any, step: Any) -> Any:
        """A step, as float32."""
        return widened(self.builder, pointer, step, WIDTH)

    def store(self, x: Any, pointer: Any, step: Any) -> None:
        """A step, rounded to nearest and to even."""
        build, bits = self.builder, self.builder.bitcast(x, _INT32)
        odd = build.and_(build.lshr(bits, self.bits(16)), self.bits(1))
        rounded = build.lshr(build.add(build.add(bits, self.bits(0x7FFF)), odd), self.bits(16))
        build.store(build.trunc(rounded, _INT16), build.gep(pointer, [step]), align=2)

    def larger(self, x: Any, largest: Any) -> Any:
        """The bits of ``|x|``, or what is larger."""
        magnitude = self.builder.and_(self.builder.bitcast(x, _INT32), self.bits(0x7FFFFFFF))
        return self.builder.select(self.builder.icmp_unsigned(">", magnitude, largest), magnitude, largest)

    def fused(self, x: Any, y: Any, z: Any) -> Any:
        """``x * y + z``, rounded once."""
        name = f"llvm.fma.v{WIDTH}f32"
        known = self.builder.module.globals.get(name)
        kind = ir.FunctionType(_FLOAT32, [_FLOAT32] * 3)
        return self.builder.call(known or ir.Function(self.builder.module, kind, name), [x, y, z])

    def unless_one(self, factor: Any, xs: Any, operation: Callable[[Any, Any], Any]) -> Any:
        """``operation(x, factor)`` where the factor is not 1."""
        build = self.builder
        vector = self.filled(factor)
        before, inside, after = build.block, build.append_basic_block("apply"), build.append_basic_block("applied")
        build.cbranch(build.fcmp_ordered("!=", factor, ir.FloatType()(1.0)), inside, after)
        build.position_at_end(inside)
        applied = operation(xs, vector)
        build.branch(after)
        build.position_at_end(after)
        result = build.phi(_FLOAT32)
        result.add_incoming(xs, before)
        result.add_incoming(applied, inside)
        return result

    def loop(self, number: Any, kind: Any, first: Any, body: Callable[[Any, Any], Any]) -> Any:
        """``for i in range(number): value = body(i, value)`` from ``first`` on; the last value."""
        build = self.builder
        before, inside, after = build.block, build.append_basic_block("loop"), build.append_basic_block("looped")
        build.cbranch(build.icmp_signed(">", number, _INDEX(0)), inside, after)
        build.position_at_end(inside)
        index, value = build.phi(_INDEX), build.phi(kind)
        next_value, following = body(index, value), build.add(index, _INDEX(1))
        last = build.block
        build.cbranch(build.icmp_signed("<", following, number), inside, after)
        index.add_incoming(_INDEX(0), before)
        index.add_incoming(following, last)
        value.add_incoming(first, before)
        value.add_incoming(next_value, last)
        build.position_at_end(after)
        result = build.phi(kind)
        result.add_incoming(first, before)
        result.add_incoming(next_value, last)
        return result

    def largest_of(self, xs: Any) -> Any:
        """Of `WIDTH` integers."""
        build = self.builder
        largest = build.extract_element(xs, ir.IntType(32)(0))
        for i in range(1, WIDTH):
            x = build.extract_element(xs, ir.IntType(32)(i))
            largest = build.select(build.icmp_unsigned(">", x, largest), x, largest)
        return largest


def _weighted_sum(*, has_base: bool, rounds_products: bool) -> Any:
    def typed(
        _typing: Any,
        addresses: Any,
        base: Any,
        factors: Any,
        number: Any,
        divisor: Any,
        scale: Any,
        out: Any,
        num_steps: Any,
    ) -> Any:
        return types.uint32(addresses, base, factors, number, divisor, scale, out, num_steps), emit

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        addresses, base, factors, number, divisor, scale, out, num_steps = arguments
        emitter = _Emitter(builder)
        address_table = emitter.pointer(addresses, _INDEX)
        factor_table = emitter.pointer(factors, ir.FloatType())
        base_steps, out_steps = emitter.pointer(base), emitter.pointer(out)

        def step(i: Any, largest: Any) -> Any:
            origin = emitter.load(base_steps, i) if has_base else None

            def add(k: Any, total: Any) -> Any:
                x = emitter.load(emitter.pointer(builder.load(builder.gep(address_table, [k]))), i)
                factor = emitter.filled(builder.load(builder.gep(factor_table, [k])))
                if has_base:
                    x = builder.fsub(x, origin)
                if rounds_products:
                    return builder.fadd(total, builder.fmul(x, factor))
                return emitter.fused(x, factor, total)

            # What is added to a negative zero stays what it is.
            total = emitter.loop(number, _FLOAT32, emitter.number(-0.0), add)
            total = emitter.unless_one(divisor, total, builder.fdiv)
            total = emitter.unless_one(scale, total, builder.fmul)
            if has_base:
                total = builder.fadd(origin, total)
            emitter.store(total, out_steps, i)
            return emitter.larger(total, largest)

        return emitter.largest_of(emitter.loop(num_steps, _INT32, emitter.bits(0), step))

    return intrinsic(typed)


def _of_two(combined: Callable[[_Emitter, Any, Any, Any], Any]) -> Any:
    def typed(_typing: Any, first: Any, second: Any, t: Any, out: Any, num_steps: Any) -> Any:
        return types.uint32(first, second, t, out, num_steps), emit

    def emit(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        first, second, t, out, num_steps = arguments
        emitter = _Emitter(builder)
        a_steps, b_steps, out_steps = (emitter.pointer(address) for address in (first, second, out))
        filled = emitter.filled(t)

        def step(i: Any, largest: Any) -> Any:
            a, b = emitter.load(a_steps, i), emitter.load(b_steps, i)
            result = combined(emitter, a, b, filled)
            emitter.store(result, out_steps, i)
            return emitter.larger(result, emitter.larger(a, emitter.larger(b, largest)))

        return emitter.largest_of(emitter.loop(num_steps, _INT32, emitter.bits(0), step))

    return intrinsic(typed)


def _clamped(emitter: _Emitter, a: Any, b: Any, t: Any) -> Any:
    build = emitter.builder
    low, high = build.fsub(a, t), build.fadd(a, t)
    least = build.select(build.fcmp_ordered(">", b, low), b, low)
    return build.select(build.fcmp_ordered("<", least, high), least, high)


def _from_first(emitter: _Emitter, a: Any, b: Any, t: Any) -> Any:
    return emitter.fused(t, emitter.builder.fsub(b, a), a)


def _from_second(emitter: _Emitter, a: Any, b: Any, t: Any) -> Any:
    return emitter.fused(t, emitter.builder.fsub(b, a), b)


sum_fused: Any = _weighted_sum(has_base=False, rounds_products=False)
"""``scale · (Σ factor_i x_i) / divisor``, products added fused.

Arguments: addresses of the inputs' addresses (int64), of the base, and of the factors (float32); how many inputs;
divisor and scale (float32); the address of the result; how many steps.
"""

sum_rounded: Any = _weighted_sum(has_base=False, rounds_products=True)
"""The same, products rounded before they are added."""

change_fused: Any = _weighted_sum(has_base=True, rounds_products=False)
"""As `sum_fused`, of ``x_i - base``, and added to the base."""

change_rounded: Any = _weighted_sum(has_base=True, rounds_products=True)
"""As `sum_rounded`, of ``x_i - base``, and added to the base."""

clamped: Any = _of_two(_clamped)
"""``b`` within ``a ± t``, where both are zero the bound.

Arguments: addresses of ``a`` and ``b``; ``t`` (float32); the address of the result; how many steps.
"""

from_first: Any = _of_two(_from_first)
"""``a + t (b - a)``, fused. Arguments as for `clamped`."""

from_second: Any = _of_two(_from_second)
"""``b + t (b - a)``, fused. Arguments as for `clamped`."""

"""Loops for formulas, in LLVM's language: elements stay in registers from where they are read to where they go.

A loop takes tensors of any floating dtypes, computes in float32, and rounds once. LLVM makes machine code of it when it
is first asked for, within a few hundredths of a second.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from mergekit_ray.core.dtypes import DType
from mergekit_ray.methods.compiled.native import Body, loaded_addresses, native, processor, turns
from mergekit_ray.methods.shared.numbers import INPUT, SCALAR, Formula

WIDTH: Final = 16
"""Elements that are computed at a time."""

LARGEST: Final = {DType.F16: 0x477FEFFF, DType.BF16: 0x7F7F7FFF, DType.F32: 0x7F7FFFFF, DType.F64: 0x7F7FFFFF}
"""The bits of the largest float32 that is not rounded to an infinity of a dtype."""

Loop = Callable[[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.float32]], int, int], bool]
"""Computes a run. Takes the addresses of the first element of each input's run, the scalars, the address for the
result, and the number of elements; returns whether all is finite, and stays so when rounded. It does not hold the
interpreter's lock."""


def _source(formula: Formula, dtypes: Sequence[DType], out: DType, *, sees_inputs: bool) -> str:
    """The function: steps of `WIDTH` elements, then what is left, one by one."""
    numbers = itertools.count()
    lines = ["define i32 @loop(ptr %addresses, ptr %scalars, ptr %out, i64 %size) {", "entry:"]
    lines += loaded_addresses(len(dtypes))
    for k in range(formula.num_scalars):
        lines.append(f"  %q{k} = getelementptr float, ptr %scalars, i64 {k}")
        lines.append(f"  %s{k} = load float, ptr %q{k}, align 4")
    lines += [f"  %whole = and i64 %size, -{WIDTH}", "  br label %wide"]
    for name, width, first, last, after in (
        ("wide", WIDTH, "0", "%whole", "narrow"),
        ("narrow", 1, "%whole", "%size", "done"),
    ):
        body = Body(width, numbers)
        seen, largest = _compute(body, name, formula, dtypes, out, sees_inputs=sees_inputs)
        lines += _looped(body, name, formula.num_scalars, (first, last), {"seen": seen, "largest": largest})
        lines.append(f"  br label %{after}")
    lines.append("done:")
    limits = {"seen": LARGEST[DType.F32], "largest": LARGEST[out]}
    fits = [f"%{name}.{kind}.fits" for name, kind in itertools.product(("wide", "narrow"), limits)]
    for name, kind in itertools.product(("wide", "narrow"), limits):
        lines.append(f"  %{name}.{kind}.fits = icmp ule i32 %{name}.{kind}.one, {limits[kind]}")
    lines += [
        f"  %first.fits = and i1 {fits[0]}, {fits[1]}",
        f"  %second.fits = and i1 {fits[2]}, {fits[3]}",
        "  %fits = and i1 %first.fits, %second.fits",
        "  %result = zext i1 %fits to i32",
        "  ret i32 %result",
        "}",
    ]
    for width in (WIDTH, 1):
        floats = f"<{width} x float>"
        lines.append(f"declare i32 @llvm.vector.reduce.umax.v{width}i32(<{width} x i32>)")
        lines.append(f"declare {floats} @llvm.fma.v{width}f32({floats}, {floats}, {floats})")
    return "\n".join(lines)


def _compute(
    body: Body, name: str, formula: Formula, dtypes: Sequence[DType], out: DType, *, sees_inputs: bool
) -> tuple[str, str]:
    """Emit the formula; returns what the largest magnitudes are then, of the inputs and of the result."""
    index, seen = f"%{name}.i", f"%{name}.seen"
    places: list[str] = []
    for operation, *operands in formula.steps:
        if operation == INPUT:
            (i,) = operands
            places.append(body.load(f"%a{i}", index, dtypes[i]))
            seen = body.larger(places[-1], seen) if sees_inputs else seen
        elif operation == SCALAR:
            places.append(f"%{name}.s{operands[0]}")
        else:
            places.append(body.step(operation, [places[i] for i in operands]))
    body.store(places[-1], "%out", index, out)
    return seen, body.larger(places[-1], f"%{name}.largest")


def _looped(
    body: Body, name: str, num_scalars: int, bounds: tuple[str, str], following: Mapping[str, str]
) -> list[str]:
    """A body from a first element on to a last one, and the largest of what it carries.

    Args:
        body: of the loop.
        name: of it, that of its values begin with.
        num_scalars: of the formula.
        bounds: the first element, and the one after the last.
        following: what the values that are carried from one turn to the next are after each.
    """
    lines = [f"{name}:"]
    for k in range(num_scalars):
        lines.append(f"  %{name}.f{k} = insertelement {body.floats} poison, float %s{k}, i32 0")
        lines.append(
            f"  %{name}.s{k} = shufflevector {body.floats} %{name}.f{k}, {body.floats} poison, "
            f"{body.words} zeroinitializer"
        )
    carried = {kind: (body.words, "zeroinitializer", value) for kind, value in following.items()}
    lines += turns(body, name, body.width, bounds, carried)
    for kind in following:
        value = f"{body.words} %{name}.{kind}.end"
        lines.append(f"  %{name}.{kind}.one = call i32 @llvm.vector.reduce.umax.v{body.width}i32({value})")
    return lines


def loop(formula: Formula, dtypes: Sequence[DType], out: DType, *, sees_inputs: bool) -> Loop:
    """What computes a formula.

    Args:
        formula: of numbers.
        dtypes: of the inputs.
        out: dtype of the result.
        sees_inputs: look for NaN and infinities in the inputs, too.
    """
    function = _function(formula, tuple(dtypes), out, sees_inputs, processor())

    def run(
        addresses: np.ndarray[Any, np.dtype[np.int64]],
        scalars: np.ndarray[Any, np.dtype[np.float32]],
        out_address: int,
        size: int,
    ) -> bool:
        return bool(function(addresses.ctypes.data, scalars.ctypes.data, out_address, size))

    return run


@functools.cache
def _function(formula: Formula, dtypes: Sequence[DType], out: DType, sees_inputs: bool, _cpu: tuple[str, str]) -> Any:
    source = _source(formula, dtypes, out, sees_inputs=sees_inputs)
    return native(source, ctypes.c_int32, *[ctypes.c_void_p] * 3, ctypes.c_int64)

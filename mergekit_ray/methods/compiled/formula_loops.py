"""Loops for formulas, in LLVM's language: elements stay in registers from where they are read to where they go.

A loop takes float16, bfloat16, float32 and float64 tensors in any mix, computes in float32, and rounds once, to nearest
and to even. It is made of IEEE operations and of integer ones, so its bits are the same on every processor.

LLVM makes machine code of it for the processor at hand when it is first asked for, within a few hundredths of a second.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import llvmlite.binding as llvm
import numpy as np

from mergekit_ray.core.dtypes import DType
from mergekit_ray.methods.shared.numbers import INPUT, SCALAR, Formula

WIDTH: Final = 16
"""Elements that are computed at a time."""

_STORED: Final = {DType.F16: "i16", DType.BF16: "i16", DType.F32: "float", DType.F64: "double"}
"""What a dtype is in memory."""

LARGEST: Final = {DType.F16: 0x477FEFFF, DType.BF16: 0x7F7F7FFF, DType.F32: 0x7F7FFFFF, DType.F64: 0x7F7FFFFF}
"""The bits of the largest float32 that is not rounded to an infinity of a dtype."""

_MAGNITUDE: Final = 0x7FFFFFFF
_TWO_TO_112: Final = "0x46F0000000000000"
"""By which float16's exponents differ from float32's, in LLVM's notation."""
_A_HALF: Final = 0x3F000000
"""The bits of 0.5. Added to what becomes a subnormal float16, it leaves that in the low bits, rounded."""

Loop = Callable[[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.float32]], int, int], bool]
"""Computes a run. Takes the addresses of the first element of each input's run, the scalars, the address for the
result, and the number of elements; returns whether all is finite, and stays so when rounded. It does not hold the
interpreter's lock."""


class _Body:
    """The lines of a loop's body.

    Args:
        width: elements at a time.
        numbers: gives each value that is made its name.
    """

    def __init__(self, width: int, numbers: itertools.count[int]) -> None:
        self.lines: list[str] = []
        self.width = width
        self._numbers = numbers
        self.floats, self.words = self.vector("float"), self.vector("i32")

    def vector(self, kind: str) -> str:
        """So many of a kind."""
        return f"<{self.width} x {kind}>"

    def all(self, value: int | str, kind: str = "i32") -> str:
        """A constant in all places."""
        return f"<{', '.join([f'{kind} {value}'] * self.width)}>"

    def made(self, line: str) -> str:
        """The name of what a line makes."""
        name = f"%v{next(self._numbers)}"
        self.lines.append(f"  {name} = {line}")
        return name

    def on_words(self, operation: str, x: str, y: str | int) -> str:
        """An operation on integers; ``y`` may be a constant."""
        return self.made(f"{operation} {self.words} {x}, {self.all(y) if isinstance(y, int) else y}")

    def bits(self, x: str) -> str:
        """Of float32 numbers."""
        return self.made(f"bitcast {self.floats} {x} to {self.words}")

    def number(self, bits: str) -> str:
        """The float32 numbers that have some bits."""
        return self.made(f"bitcast {self.words} {bits} to {self.floats}")

    def chosen(self, condition: str, x: str, y: str, kind: str) -> str:
        """``x`` where a condition holds, else ``y``."""
        return self.made(f"select {self.vector('i1')} {condition}, {kind} {x}, {kind} {y}")

    def load(self, address: str, index: str, dtype: DType) -> str:
        """Elements as float32."""
        stored = self.vector(_STORED[dtype])
        place = self.made(f"getelementptr {_STORED[dtype]}, ptr {address}, i64 {index}")
        x = self.made(f"load {stored}, ptr {place}, align {dtype.itemsize}")
        if dtype is DType.F64:
            return self.made(f"fptrunc {stored} {x} to {self.floats}")
        if dtype is DType.F32:
            return x
        wide = self.made(f"zext {stored} {x} to {self.words}")
        if dtype is DType.BF16:
            return self.number(self.on_words("shl", wide, 16))
        sign = self.on_words("shl", self.on_words("and", wide, 0x8000), 16)
        magnitude = self.on_words("shl", self.on_words("and", wide, 0x7FFF), 13)
        scaled = self.bits(self.made(f"fmul {self.floats} {self.number(magnitude)}, {self.all(_TWO_TO_112, 'float')}"))
        is_finite = self.made(f"icmp ult {self.words} {magnitude}, {self.all(0x7C00 << 13)}")
        exact = self.chosen(is_finite, scaled, self.on_words("or", magnitude, 0x7F800000), self.words)
        return self.number(self.on_words("or", exact, sign))

    def store(self, x: str, address: str, index: str, dtype: DType) -> None:
        """Rounded."""
        stored = self.vector(_STORED[dtype])
        place = self.made(f"getelementptr {_STORED[dtype]}, ptr {address}, i64 {index}")
        if dtype is DType.F64:
            x = self.made(f"fpext {self.floats} {x} to {stored}")
        elif dtype is not DType.F32:
            rounded = self._half(self.bits(x)) if dtype is DType.F16 else self._upper(self.bits(x))
            x = self.made(f"trunc {self.words} {rounded} to {stored}")
        self.lines.append(f"  store {stored} {x}, ptr {place}, align {dtype.itemsize}")

    def _upper(self, bits: str) -> str:
        odd = self.on_words("and", self.on_words("lshr", bits, 16), 1)
        return self.on_words("lshr", self.on_words("add", self.on_words("add", bits, 0x7FFF), odd), 16)

    def _half(self, bits: str) -> str:
        """Of what `LARGEST` allows."""
        sign = self.on_words("lshr", self.on_words("and", bits, 0x80000000), 16)
        magnitude = self.on_words("and", bits, _MAGNITUDE)
        moved = self.made(f"fadd {self.floats} {self.number(magnitude)}, {self.all('0.5', 'float')}")
        subnormal = self.on_words("sub", self.bits(moved), _A_HALF)
        odd = self.on_words("and", self.on_words("lshr", magnitude, 13), 1)
        carried = self.on_words("add", self.on_words("add", magnitude, 0xC8000FFF), odd)
        is_subnormal = self.made(f"icmp ult {self.words} {magnitude}, {self.all(0x38800000)}")
        rounded = self.chosen(is_subnormal, subnormal, self.on_words("lshr", carried, 13), self.words)
        return self.on_words("or", rounded, sign)

    def larger(self, x: str, largest: str) -> str:
        """The bits of ``|x|``, or what is larger."""
        magnitude = self.on_words("and", self.bits(x), _MAGNITUDE)
        is_larger = self.made(f"icmp ugt {self.words} {magnitude}, {largest}")
        return self.chosen(is_larger, magnitude, largest, self.words)

    def step(self, operation: str, operands: Sequence[str]) -> str:
        """One operation of a formula."""
        if operation == "fma":
            arguments = ", ".join(f"{self.floats} {x}" for x in operands)
            return self.made(f"call {self.floats} @llvm.fma.v{self.width}f32({arguments})")
        x, y = operands
        if operation in ("minimum", "maximum"):
            comparison = {"minimum": "olt", "maximum": "ogt"}[operation]
            condition = self.made(f"fcmp {comparison} {self.floats} {x}, {y}")
            return self.chosen(condition, x, y, self.floats)
        return self.made(f"{operation} {self.floats} {x}, {y}")


def _source(formula: Formula, dtypes: Sequence[DType], out: DType, *, sees_inputs: bool) -> str:
    """The function: steps of `WIDTH` elements, then what is left, one by one."""
    numbers = itertools.count()
    lines = ["define i32 @loop(ptr %addresses, ptr %scalars, ptr %out, i64 %size) {", "entry:"]
    for i in range(len(dtypes)):
        lines.append(f"  %p{i} = getelementptr ptr, ptr %addresses, i64 {i}")
        lines.append(f"  %a{i} = load ptr, ptr %p{i}, align 8")
    for k in range(formula.num_scalars):
        lines.append(f"  %q{k} = getelementptr float, ptr %scalars, i64 {k}")
        lines.append(f"  %s{k} = load float, ptr %q{k}, align 4")
    lines += [f"  %whole = and i64 %size, -{WIDTH}", "  br label %wide"]
    for name, width, first, last, after in (
        ("wide", WIDTH, "0", "%whole", "narrow"),
        ("narrow", 1, "%whole", "%size", "done"),
    ):
        body = _Body(width, numbers)
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
    body: _Body, name: str, formula: Formula, dtypes: Sequence[DType], out: DType, *, sees_inputs: bool
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
    body: _Body, name: str, num_scalars: int, bounds: tuple[str, str], following: Mapping[str, str]
) -> list[str]:
    """A body from a first element on to a last one.

    Args:
        body: of the loop.
        name: of it, that of its values begin with.
        num_scalars: of the formula.
        bounds: the first element, and the one after the last.
        following: what the values that are carried from one turn to the next are after each.
    """
    first, last = bounds
    lines = [f"{name}:"]
    for k in range(num_scalars):
        lines.append(f"  %{name}.f{k} = insertelement {body.floats} poison, float %s{k}, i32 0")
        lines.append(
            f"  %{name}.s{k} = shufflevector {body.floats} %{name}.f{k}, {body.floats} poison, "
            f"{body.words} zeroinitializer"
        )
    lines += [
        f"  %{name}.any = icmp ult i64 {first}, {last}",
        f"  br i1 %{name}.any, label %{name}.loop, label %{name}.done",
        f"{name}.loop:",
        f"  %{name}.i = phi i64 [ {first}, %{name} ], [ %{name}.next, %{name}.loop ]",
        *(
            f"  %{name}.{kind} = phi {body.words} [ zeroinitializer, %{name} ], [ {value}, %{name}.loop ]"
            for kind, value in following.items()
        ),
        *body.lines,
        f"  %{name}.next = add i64 %{name}.i, {body.width}",
        f"  %{name}.more = icmp ult i64 %{name}.next, {last}",
        f"  br i1 %{name}.more, label %{name}.loop, label %{name}.done",
        f"{name}.done:",
        *(
            f"  %{name}.all.{kind} = phi {body.words} [ zeroinitializer, %{name} ], [ {value}, %{name}.loop ]"
            for kind, value in following.items()
        ),
    ]
    for kind in following:
        value = f"{body.words} %{name}.all.{kind}"
        lines.append(f"  %{name}.{kind}.one = call i32 @llvm.vector.reduce.umax.v{body.width}i32({value})")
    return lines


_lock = threading.RLock()


@functools.cache
def _machine(cpu: str, features: str) -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=cpu, features=features, opt=2, jit=True)


@functools.cache
def processor() -> tuple[str, str]:
    """What loops are made for: LLVM's name of the processor, and of its features."""
    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


@functools.cache
def _engine(formula: Formula, dtypes: tuple[DType, ...], out: DType, sees_inputs: bool, cpu: tuple[str, str]) -> Any:
    machine = _machine(*cpu)
    module = llvm.parse_assembly(_source(formula, dtypes, out, sees_inputs=sees_inputs))
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine


def loop(formula: Formula, dtypes: Sequence[DType], out: DType, *, sees_inputs: bool) -> Loop:
    """What computes a formula.

    Args:
        formula: of numbers.
        dtypes: of the inputs.
        out: dtype of the result.
        sees_inputs: look for NaN and infinities in the inputs, too.
    """
    with _lock:  # LLVM compiles one function at a time
        engine = _engine(formula, tuple(dtypes), out, sees_inputs, processor())
    kind = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    function = kind(engine.get_function_address("loop"))

    def run(
        addresses: np.ndarray[Any, np.dtype[np.int64]],
        scalars: np.ndarray[Any, np.dtype[np.float32]],
        out_address: int,
        size: int,
    ) -> bool:
        return bool(function(addresses.ctypes.data, scalars.ctypes.data, out_address, size))

    return run

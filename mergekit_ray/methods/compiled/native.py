"""Functions in LLVM's language, and machine code of them for the processor at hand.

Numbers are read as float32 from float16, bfloat16, float32 or float64, and rounded once when they are written, to
nearest and to even. All of it is IEEE operations and integer ones, so its bits are the same on every processor.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

import llvmlite.binding as llvm

from mergekit_ray.core.dtypes import DType

_STORED: Final = {DType.F16: "i16", DType.BF16: "i16", DType.F32: "float", DType.F64: "double"}
"""What a dtype is in memory."""

_MAGNITUDE: Final = 0x7FFFFFFF
_TWO_TO_112: Final = "0x46F0000000000000"
"""By which float16's exponents differ from float32's, in LLVM's notation."""
_A_HALF: Final = 0x3F000000
"""The bits of 0.5. Added to what becomes a subnormal float16, it leaves that in the low bits, rounded."""


class Body:
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
        """Of what is finite then."""
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


def loaded_addresses(number: int) -> list[str]:
    """Lines that make ``%a0`` and so on of so many addresses in a table."""
    lines = []
    for i in range(number):
        lines.append(f"  %p{i} = getelementptr ptr, ptr %addresses, i64 {i}")
        lines.append(f"  %a{i} = load ptr, ptr %p{i}, align 8")
    return lines


def turns(
    body: Body, name: str, step: int, bounds: tuple[str, str], carried: Mapping[str, tuple[str, str, str]]
) -> list[str]:
    """A body from a first element on to a last one. ``%NAME.i`` is the element that a turn begins with.

    Args:
        body: of the loop.
        name: of the block before it, that of its values begin with.
        step: elements in a turn.
        bounds: the first element, and the one after the last.
        carried: values from one turn to the next, ``%NAME.KEY`` in the body and ``%NAME.KEY.end`` behind it: their
            type, what they are at first, and what they are after a turn.
    """
    first, last = bounds
    ends = {
        key: f"phi {kind} [ {at_first}, %{name} ], [ {x}, %{name}.loop ]"
        for key, (kind, at_first, x) in carried.items()
    }
    return [
        f"  %{name}.any = icmp ult i64 {first}, {last}",
        f"  br i1 %{name}.any, label %{name}.loop, label %{name}.done",
        f"{name}.loop:",
        f"  %{name}.i = phi i64 [ {first}, %{name} ], [ %{name}.next, %{name}.loop ]",
        *(f"  %{name}.{key} = {end}" for key, end in ends.items()),
        *body.lines,
        f"  %{name}.next = add i64 %{name}.i, {step}",
        f"  %{name}.more = icmp ult i64 %{name}.next, {last}",
        f"  br i1 %{name}.more, label %{name}.loop, label %{name}.done",
        f"{name}.done:",
        *(f"  %{name}.{key}.end = {end}" for key, end in ends.items()),
    ]


_lock = threading.RLock()


@functools.cache
def processor() -> tuple[str, str]:
    """What code is made for: LLVM's name of the processor, and of its features."""
    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


@functools.cache
def _machine(cpu: str, features: str) -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_default_triple()
    return target.create_target_machine(cpu=cpu, features=features, opt=2, jit=True)


@functools.cache
def _engine(source: str, cpu: tuple[str, str]) -> Any:
    machine = _machine(*cpu)
    module = llvm.parse_assembly(source)
    module.triple, module.data_layout = machine.triple, str(machine.target_data)
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine


def native(source: str, result: Any, *arguments: Any) -> Any:
    """The function ``loop`` of a source, which does not hold the interpreter's lock.

    Args:
        source: in LLVM's language.
        result: type, as `ctypes` has it.
        arguments: types.
    """
    with _lock:  # LLVM compiles one function at a time
        address = _engine(source, processor()).get_function_address("loop")
    return ctypes.CFUNCTYPE(result, *arguments)(address)

"""Formulas over numbers: written once in plain Python, each becomes a loop over the elements of tensors.

A formula is called with `Number`s in place of an element of each tensor. What it returns says which steps lead to the
result, and each step is rounded as IEEE 754 has it, in the order in which it is written. So the bits are the same on
every processor: nothing is reordered, and a product and a sum are rounded once only where `fma` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Step: TypeAlias = tuple[str, *tuple[int, ...]]
"""An operation, and the places of its operands among the steps before it; of `INPUT`, the number of the tensor, and of
`SCALAR`, that of the scalar."""

INPUT, SCALAR = "input", "scalar"


class Number:
    """An element of a tensor, a scalar, or what an operation makes of some.

    Args:
        operation: see the functions of this module.
        operands: what it is done to.
        index: of an input.
        value: of a scalar.
    """

    __slots__ = ("index", "operands", "operation", "value")

    def __init__(self, operation: str, *operands: Number, index: int = 0, value: float = 0.0) -> None:
        self.operation = operation
        self.operands = operands
        self.index = index
        self.value = value

    def __add__(self, other: Number | float) -> Number:
        return Number("fadd", self, number(other))

    def __sub__(self, other: Number | float) -> Number:
        return Number("fsub", self, number(other))

    def __mul__(self, other: Number | float) -> Number:
        return Number("fmul", self, number(other))

    def __truediv__(self, other: Number | float) -> Number:
        return Number("fdiv", self, number(other))


def number(x: Number | float) -> Number:
    """A plain number as a scalar, which is rounded to the dtype of the arithmetic."""
    return x if isinstance(x, Number) else Number(SCALAR, value=float(x))


def fma(x: Number, y: Number | float, z: Number) -> Number:
    """``x · y + z``, rounded once (IEEE 754-2019, 5.4.1)."""
    return Number("fma", x, number(y), z)


def minimum(x: Number, y: Number) -> Number:
    """``x`` where it is less than ``y``, else ``y``."""
    return Number("minimum", x, y)


def maximum(x: Number, y: Number) -> Number:
    """``x`` where it is more than ``y``, else ``y``."""
    return Number("maximum", x, y)


@dataclass(frozen=True, slots=True)
class Formula:
    """What is done, apart from what with: formulas that differ in their scalars only are equal.

    Attributes:
        steps: in order; the last one is the result. Whatever is used twice is there once.
    """

    steps: tuple[Step, ...]

    @property
    def num_scalars(self) -> int:
        """How many scalars it takes."""
        return sum(step[0] == SCALAR for step in self.steps)


def formula_of(result: Number) -> tuple[Formula, Sequence[float]]:
    """The steps that lead to a number, and the scalars that they take, by their numbers."""
    steps: list[Step] = []
    scalars: list[float] = []
    places: dict[int, int] = {}

    def place(x: Number) -> int:
        known = places.get(id(x))
        if known is not None:
            return known
        if x.operation == SCALAR:
            step: Step = (SCALAR, len(scalars))
            scalars.append(x.value)
        elif x.operation == INPUT:
            step = (INPUT, x.index)
        else:
            step = (x.operation, *map(place, x.operands))
        steps.append(step)
        places[id(x)] = len(steps) - 1
        return len(steps) - 1

    place(result)
    return Formula(tuple(steps)), scalars

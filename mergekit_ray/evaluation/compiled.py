"""Expressions that are computed without torch, whose import takes longer than a small merge.

Compiled loops compute sums from the bytes read to the bytes written; the values of routers are small. Results are those
of `evaluation.evaluate`, bit for bit. It computes all other expressions, and whatever turns out not to be finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Constant, Expression, Literal, Noise
from mergekit_ray.evaluation import noise
from mergekit_ray.evaluation.compiled_sums import BITS, CompiledSum
from mergekit_ray.evaluation.pieces import Bytes, Filling, Pieces
from mergekit_ray.evaluation.pool import ComputePool

Floats = np.ndarray[Any, np.dtype[np.float32]]


class Compiled(Protocol):
    """An expression that can be computed so."""

    def begin(self, pieces: Pieces, pool: ComputePool) -> Filling | None:
        """What writes any run of a window's elements; None where it is for the evaluator.

        Args:
            pieces: of each input.
            pool: threads to compute on.
        """
        ...


def compiled(expression: Expression) -> Compiled | None:
    """What computes an expression without torch; None for other kinds."""
    return CompiledSum.of(expression) or RouterValues.of(expression)


def objection(expression: Expression) -> str | None:
    """Why an expression cannot be computed so, in words; None if it can."""
    return None if RouterValues.of(expression) else CompiledSum.objection(expression)


@dataclass(frozen=True, slots=True)
class RouterValues:
    """Values that the plan holds, or noise around a constant: what routers are made of.

    Attributes:
        expression: a `Literal`, or `Noise` around a `Constant`.
    """

    expression: Literal | Noise

    @classmethod
    def of(cls, expression: Expression) -> Self | None:
        """The same as an expression; None if it is not of this kind."""
        if expression.spec.dtype not in BITS:
            return None
        if isinstance(expression, Literal):
            return cls(expression)
        if not isinstance(expression, Noise) or expression.compute_dtype is not DType.F32:
            return None
        around = expression.x
        return cls(expression) if isinstance(around, Constant) and around.spec.dtype is DType.F32 else None

    def begin(self, pieces: Pieces, pool: ComputePool) -> Filling:
        """See `Compiled.begin`."""
        del pieces, pool
        return self._fill

    def _fill(self, start: int, out: Bytes) -> bool:
        result = out.view(BITS[self.expression.spec.dtype])
        held = np.frombuffer(self.expression.data, "<f4") if isinstance(self.expression, Literal) else None
        is_finite = True
        stop = start + result.size
        for first in range(start, stop, noise.RUN_ELEMENTS):
            last = min(first + noise.RUN_ELEMENTS, stop)
            values = self._noise(first, last) if held is None else held[first:last]
            is_finite &= _round(values, result[first - start : last - start])
        return is_finite

    def _noise(self, start: int, stop: int) -> Floats:
        assert isinstance(self.expression, Noise)
        assert isinstance(self.expression.x, Constant)
        values = np.full(stop - start, self.expression.x.value, np.float32)
        if self.expression.scale:
            drawn = noise.DRAW[self.expression.distribution](self.expression.key, start, stop - start)
            drawn *= self.expression.scale
            values += drawn.astype(np.float32)
        return values


def _round(values: Floats, out: np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]) -> bool:
    """Round to bfloat16, to nearest and to even, or not at all, as ``out`` is wide; whether all is and stays finite."""
    bits: np.ndarray[Any, np.dtype[np.uint32]] = values.view(np.uint32)
    if out.itemsize == 2:  # bytes
        upper = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        out[:] = upper
        bits = upper << np.uint32(16)
    else:
        out[:] = bits
    exponent = np.uint32(0x7F800000)
    return bool(np.isfinite(values).all()) and not bool(((bits & exponent) == exponent).any())

"""Expressions that are computed without torch, whose import takes longer than a small merge.

Sums run in compiled loops from the bytes that were read to those that are written; what routers are made of is small.
Results are those of `runtime.evaluate`, bit for bit; what is not of the right kind, and whatever turns out not to be
finite, is left to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self

import numpy as np

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.expressions import Constant, Expression, Literal, Load, Merge, Noise
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.protocol import WeightedSum
from mergekit_ray.runtime import noise
from mergekit_ray.runtime.buffers import Bytes
from mergekit_ray.runtime.pool import ComputePool

_BITS: Final[dict[DType, type[np.unsignedinteger[Any]]]] = {DType.BF16: np.uint16, DType.F32: np.uint32}
"""Dtypes that the loops read and write, and what carries their bits."""

Floats = np.ndarray[Any, np.dtype[np.float32]]

_CHUNK_ELEMENTS: Final = 1 << 17
"""Elements handled at a time: 512 KiB of sums, which stay in the cache of a core."""


class Fused(Protocol):
    """An expression that can be computed so."""

    def fill(
        self,
        pieces: Mapping[Load, Bytes],
        starts: Mapping[Load, int],
        start: int,
        stop: int,
        out: Bytes,
        pool: ComputePool,
    ) -> bool:
        """Write elements ``[start, stop)``.

        Args:
            pieces: the bytes of each input, or a window of them.
            starts: flat index of the first element in each.
            start: of the run.
            stop: of the run.
            out: as many bytes as the run has.
            pool: threads to compute on.

        Returns:
            Whether the result is finite. If not, ``out`` is not the result.
        """
        ...


def fused(expression: Expression) -> Fused | None:
    """What computes an expression without torch; None if it is not of a kind that this is there for."""
    return FusedSum.of(expression) or FusedValues.of(expression)


@dataclass(frozen=True, slots=True)
class FusedSum:
    """``Σ factor_i x_i / divisor`` of tensors as they lie in files.

    Attributes:
        terms: what is read, all of one shape.
        factors, divisor: in float32, the compute dtype.
        dtype: of the result.
    """

    terms: Sequence[Load]
    factors: Sequence[np.float32]
    divisor: np.float32
    dtype: DType

    @classmethod
    def of(cls, expression: Expression) -> Self | None:
        """The same as an expression; None if it is not of this kind."""
        if (
            not isinstance(expression, Merge)
            or expression.base is not None
            or expression.compute_dtype is not DType.F32
            or expression.spec.dtype not in _BITS
        ):
            return None
        terms = [x for x in expression.inputs if isinstance(x, Load) and x.spec.dtype in _BITS]
        method = METHODS.get(expression.method)
        if len(terms) < len(expression.inputs) or not issubclass(method, WeightedSum):
            return None
        weights = [method.model_parameters.model_validate(dict(each)) for each in expression.input_parameters]
        parameters = method.global_parameters.model_validate(dict(expression.parameters))
        try:
            factors, divisor = method.weights(parameters, weights)
        except MergeError:
            return None  # which the evaluator says, and of which tensor
        return cls(terms, [np.float32(factor) for factor in factors], np.float32(divisor), expression.spec.dtype)

    def fill(
        self,
        pieces: Mapping[Load, Bytes],
        starts: Mapping[Load, int],
        start: int,
        stop: int,
        out: Bytes,
        pool: ComputePool,
    ) -> bool:
        """See `Fused.fill`."""
        from mergekit_ray.methods.compiled import sums  # noqa: PLC0415 - numba is imported where something is computed

        terms = []
        for load in self.terms:
            dtype, first = load.spec.dtype, starts[load]
            bits = pieces[load].view(_BITS[dtype])[start - first : stop - first]
            terms.append((bits, np.uint32(32 - 8 * dtype.itemsize)))
        result = out.view(_BITS[self.dtype])
        store = sums.rounded if self.dtype is DType.BF16 else sums.copied

        def run(first: int, last: int) -> bool:
            scratch = np.empty(min(_CHUNK_ELEMENTS, result.size), np.float32)
            is_finite = True
            for low in range(first * _CHUNK_ELEMENTS, min(last * _CHUNK_ELEMENTS, result.size), _CHUNK_ELEMENTS):
                high = min(low + _CHUNK_ELEMENTS, result.size)
                total = scratch[: high - low]
                add = sums.scaled
                for (bits, shift), factor in zip(terms, self.factors, strict=True):
                    add(bits[low:high], shift, factor, total)
                    add = sums.add_scaled
                if self.divisor != 1.0:
                    sums.divide(total, self.divisor)
                is_finite &= store(total, result[low:high])
            return is_finite

        return all(pool.map_runs(-(-result.size // _CHUNK_ELEMENTS), run))


@dataclass(frozen=True, slots=True)
class FusedValues:
    """Values that the plan holds, or noise around a constant: what routers are made of.

    Attributes:
        expression: a `Literal`, or `Noise` around a `Constant`.
    """

    expression: Literal | Noise

    @classmethod
    def of(cls, expression: Expression) -> Self | None:
        """The same as an expression; None if it is not of this kind."""
        if expression.spec.dtype not in _BITS:
            return None
        if isinstance(expression, Literal):
            return cls(expression)
        if not isinstance(expression, Noise) or expression.compute_dtype is not DType.F32:
            return None
        around = expression.x
        return cls(expression) if isinstance(around, Constant) and around.spec.dtype is DType.F32 else None

    def fill(
        self,
        pieces: Mapping[Load, Bytes],
        starts: Mapping[Load, int],
        start: int,
        stop: int,
        out: Bytes,
        pool: ComputePool,
    ) -> bool:
        """See `Fused.fill`."""
        del pieces, starts, pool
        result = out.view(_BITS[self.expression.spec.dtype])
        held = np.frombuffer(self.expression.data, "<f4") if isinstance(self.expression, Literal) else None
        is_finite = True
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

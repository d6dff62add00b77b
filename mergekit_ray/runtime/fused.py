"""Expressions that are computed without torch, whose import takes longer than a small merge.

Sums run in compiled loops from the bytes that were read to those that are written; what routers are made of is small.
Results are those of `runtime.evaluate`, bit for bit; what is not of the right kind, and whatever turns out not to be
finite, is left to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self, TypeAlias

import numpy as np

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.expressions import Constant, Expression, Literal, Load, Merge, Noise
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.gram import DOT_ELEMENTS, dots, num_products, summed_products
from mergekit_ray.methods.protocol import Held, Interpolation, Sum, SumMethod
from mergekit_ray.runtime import noise
from mergekit_ray.runtime.buffers import Bytes
from mergekit_ray.runtime.pool import ComputePool

_BITS: Final[dict[DType, type[np.unsignedinteger[Any]]]] = {DType.BF16: np.uint16, DType.F32: np.uint32}
"""Dtypes that the loops read and write, and what carries their bits."""

_ONE: Final = np.float32(1.0)
_NO_SHIFT: Final = np.uint32(0)

Floats = np.ndarray[Any, np.dtype[np.float32]]
Combination: TypeAlias = Sum | Interpolation | Held

Pieces: TypeAlias = Mapping[Load, tuple[Bytes, int]]
"""Of each load the bytes of a window, and the flat index of its first element."""

_CHUNK_ELEMENTS: Final = 1 << 17
"""Elements handled at a time: 512 KiB of sums, which stay in the cache of a core."""


class Fused(Protocol):
    """An expression that can be computed so."""

    def fill(self, pieces: Pieces, start: int, out: Bytes, pool: ComputePool) -> bool:
        """Write a run of elements.

        Args:
            pieces: of each input.
            start: flat index of the first element.
            out: as many bytes as the run has.
            pool: threads to compute on.

        Returns:
            Whether the result is finite. If not, ``out`` is not the result.
        """
        ...


def fused(expression: Expression) -> Fused | None:
    """What computes an expression without torch; None if it is not of a kind that this is there for."""
    return FusedSum.of(expression) or FusedValues.of(expression)


class FusedSum:
    """A sum of tensors as they lie in files, or of their changes.

    Args:
        merge: by a `SumMethod`.
        vectors: what is summed: the inputs, after the base if that is one of them.
        base: what is subtracted from each, and added to the sum; None without one.
    """

    def __init__(self, merge: Merge, vectors: Sequence[Load], base: Load | None) -> None:
        self._merge = merge
        self._vectors = vectors
        self._base = base

    @classmethod
    def of(cls, expression: Expression) -> Self | None:
        """The same as an expression; None if it is not of this kind."""
        if (
            not isinstance(expression, Merge)
            or expression.compute_dtype is not DType.F32
            or expression.spec.dtype not in _BITS
        ):
            return None
        method = METHODS.get(expression.method)
        read = [*expression.inputs, *([] if expression.base is None else [expression.base])]
        loads = [x for x in read if isinstance(x, Load) and x.spec.dtype in _BITS]
        if len(loads) < len(read) or not issubclass(method, SumMethod):
            return None
        if expression.base is None:
            return cls(expression, loads, None)
        *inputs, base = loads
        return cls(expression, [base, *inputs], None) if method.base_is_input else cls(expression, inputs, base)

    def fill(self, pieces: Pieces, start: int, out: Bytes, pool: ComputePool) -> bool:
        """See `Fused.fill`."""
        method = METHODS.get(self._merge.method)
        assert issubclass(method, SumMethod)  # seen to by `of`
        read = {load: _Bits.of(load, *pieces[load]) for load in {*self._vectors, *_present(self._base)}}
        vectors, base = [read[load] for load in self._vectors], None if self._base is None else read[self._base]
        try:
            how = method.sum_of(_Tensor(self._merge, vectors, base, pool))
        except MergeError:
            return False  # which the evaluator says, and of which tensor
        if how is None:
            return False
        result = out.view(_BITS[self._merge.spec.dtype])
        chunk_elements = _CHUNK_ELEMENTS if base is None and isinstance(how, Sum) else _CHUNK_ELEMENTS // 2

        def run(first: int, last: int) -> bool:
            scratch = _Scratch(min(chunk_elements, result.size))
            is_finite = True
            for low in range(first * chunk_elements, min(last * chunk_elements, result.size), chunk_elements):
                high = min(low + chunk_elements, result.size)
                if not method.propagates_non_finite and not _all_finite(read.values(), start + low, start + high):
                    return False
                total = _summed(how, vectors, base, start + low, start + high, scratch)
                is_finite &= _stored(total, result[low:high])
            return is_finite

        return all(pool.map_runs(-(-result.size // chunk_elements), run))


@dataclass(frozen=True, slots=True)
class _Bits:
    """A tensor's numbers, or a run of them, by their bits.

    Attributes:
        bits: uint16 of bfloat16, uint32 of float32.
        shift: that makes a float32's bits of them.
        start: flat index of the first.
    """

    bits: np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]
    shift: np.uint32
    start: int

    @classmethod
    def of(cls, load: Load, data: Bytes, start: int) -> Self:
        return cls(data.view(_BITS[load.spec.dtype]), np.uint32(32 - 8 * load.spec.dtype.itemsize), start)

    def run(self, start: int, stop: int) -> tuple[np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]], np.uint32]:
        """Elements ``[start, stop)`` of the tensor, and the shift."""
        return self.bits[start - self.start : stop - self.start], self.shift


class _Scratch:
    """Float32 runs of one thread, by number."""

    def __init__(self, num_elements: int) -> None:
        self._num_elements = num_elements
        self._runs: list[Floats] = []

    def run(self, number: int, num_elements: int) -> Floats:
        while number >= len(self._runs):
            self._runs.append(np.empty(self._num_elements, np.float32))
        return self._runs[number][:num_elements]


class _Tensor:
    """See `SummedTensor`."""

    def __init__(self, merge: Merge, vectors: Sequence[_Bits], base: _Bits | None, pool: ComputePool) -> None:
        method = METHODS.get(merge.method)
        self.shape = merge.spec.shape
        self.parameters: Any = method.global_parameters.model_validate(dict(merge.parameters))
        self.input_parameters: Sequence[Any] = [
            method.model_parameters.model_validate(dict(each)) for each in merge.input_parameters
        ]
        self._num_elements = merge.spec.num_elements
        self._vectors, self._base, self._pool = vectors, base, pool

    def inner_products(self) -> list[float]:
        """See `SummedTensor.inner_products`."""
        size = DOT_ELEMENTS

        def run(first: int, last: int) -> list[list[Sequence[float]]]:
            scratch = _Scratch(min(size, self._num_elements))
            ends = [min((number + 1) * size, self._num_elements) for number in range(first, last)]
            return [dots(_floats(self._vectors, self._base, (end - 1) // size * size, end, scratch)) for end in ends]

        blocks = [block for part in self._pool.map_runs(-(-self._num_elements // size), run) for block in part]
        return summed_products(blocks, num_products(len(self._vectors)))


def _floats(vectors: Sequence[_Bits], base: _Bits | None, start: int, stop: int, scratch: _Scratch) -> list[Floats]:
    """Elements ``[start, stop)`` of each vector, less the base's if there is one, in scratch from number 1 on."""
    from mergekit_ray.methods.compiled import sums  # noqa: PLC0415 - numba is imported where something is computed

    origin = scratch.run(0, stop - start)
    if base is not None:
        sums.scaled(*base.run(start, stop), _ONE, origin)
    found = []
    for number, vector in enumerate(vectors, 1):
        values = scratch.run(number, stop - start)
        if base is None:
            sums.scaled(*vector.run(start, stop), _ONE, values)
        else:
            sums.difference(*vector.run(start, stop), origin, values)
        found.append(values)
    return found


def _summed(
    how: Sum | Interpolation | Held,
    vectors: Sequence[_Bits],
    base: _Bits | None,
    start: int,
    stop: int,
    scratch: _Scratch,
) -> Floats:
    """Elements ``[start, stop)`` of the sum."""
    from mergekit_ray.methods.compiled import sums  # noqa: PLC0415 - numba is imported where something is computed

    total = scratch.run(0, stop - start)
    if not isinstance(how, Sum):
        first, second = _floats(vectors, None, start, stop, scratch)
        if isinstance(how, Held):
            sums.hold(second, first, np.float32(how.t), total)
        else:
            sums.interpolate(first, second, np.float32(how.t), total)
        return total
    origin, change = scratch.run(1, stop - start), scratch.run(2, stop - start)
    if base is not None:
        sums.scaled(*base.run(start, stop), _ONE, origin)
    add = sums.scaled
    for vector, factor in zip(vectors, how.factors, strict=True):
        bits, shift = vector.run(start, stop)
        if base is not None:
            sums.difference(bits, shift, origin, change)
            bits, shift = change.view(np.uint32), _NO_SHIFT
        add(bits, shift, np.float32(factor), total)
        add = sums.add_rounded if how.rounds_products else sums.add_scaled
    if how.divisor != 1.0:
        sums.divide(total, np.float32(how.divisor))
    if how.scale != 1.0:
        sums.multiply(total, np.float32(how.scale))
    if base is not None:
        sums.add(total, origin)
    return total


def _stored(total: Floats, out: np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]) -> bool:
    """Round into ``out``, as wide as that is; whether all is finite."""
    from mergekit_ray.methods.compiled import sums  # noqa: PLC0415 - numba is imported where something is computed

    is_finite: bool = (sums.rounded if out.itemsize == 2 else sums.copied)(total, out)  # bytes
    return is_finite


def _all_finite(tensors: Iterable[_Bits], start: int, stop: int) -> bool:
    from mergekit_ray.methods.compiled import sums  # noqa: PLC0415 - numba is imported where something is computed

    return all(sums.all_finite(*tensor.run(start, stop)) for tensor in tensors)


def _present(load: Load | None) -> list[Load]:
    return [] if load is None else [load]


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

    def fill(self, pieces: Pieces, start: int, out: Bytes, pool: ComputePool) -> bool:
        """See `Fused.fill`."""
        del pieces, pool
        result = out.view(_BITS[self.expression.spec.dtype])
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

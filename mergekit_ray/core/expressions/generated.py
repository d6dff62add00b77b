"""Tensors that no file holds: constants, computed values, noise, and several tensors laid end to end."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

from mergekit_ray.core.declaration import Access
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions.base import (
    Expression,
    Stored,
    expression_kind,
    from_json,
    most,
    spec_from_json,
    spec_to_json,
    stored,
    to_json,
)
from mergekit_ray.core.tensors import TensorSpec

DISTRIBUTIONS = ("normal", "uniform")
"""What `Noise` draws from: standard normal, or uniform between -1 and 1."""

_LITERAL_ITEMSIZE = 4


@expression_kind("noise")
@dataclass(frozen=True, slots=True)
class Noise(Expression):
    """``x + scale * e``, computed in ``compute_dtype`` and rounded once to ``dtype``.

    Each element of ``e`` is a pure function of ``key`` and the element's index: the same for any cut, order, worker or
    retry.

    Attributes:
        distribution: of ``e``, one of `DISTRIBUTIONS`.
        scale: standard deviation of the normal noise, or half the width of the uniform one.
        key: names the stream of random numbers; different keys give independent noise.
    """

    x: Expression
    distribution: str
    scale: float
    key: str
    dtype: DType
    compute_dtype: DType = DType.F32

    def __post_init__(self) -> None:
        """Check the distribution and the scale.

        Raises:
            ValueError: an unknown distribution, or a scale that is negative or not finite.
        """
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"unknown distribution {self.distribution!r}; accepted: {', '.join(DISTRIBUTIONS)}")
        if not 0.0 <= self.scale < math.inf:
            raise ValueError(f"the scale of noise is finite and not negative, found {self.scale}")

    @property
    def spec(self) -> TensorSpec:
        """Spec of ``x`` with the output dtype."""
        inner = self.x.spec
        return TensorSpec(inner.name, self.dtype, inner.shape)

    def children(self) -> tuple[Expression, ...]:
        """``x``."""
        return (self.x,)

    def to_data(self) -> list[Any]:
        """``[x, distribution, scale, key, dtype, compute_dtype]``."""
        dtypes = [self.dtype.value, self.compute_dtype.value]
        return [to_json(self.x), self.distribution, self.scale, self.key, *dtypes]

    @classmethod
    def from_data(cls, data: list[Any]) -> Self:
        """Inverse of `to_data`."""
        x, distribution, scale, key, dtype, compute_dtype = data
        return cls(from_json(x), distribution, scale, key, DType(dtype), DType(compute_dtype))


@expression_kind("constant")
@dataclass(frozen=True, slots=True)
class Constant(Expression):
    """A tensor whose elements are all ``value``, rounded to its dtype."""

    spec: TensorSpec
    value: float

    def __post_init__(self) -> None:
        """Check the value.

        Raises:
            ValueError: it is not finite.
        """
        if not math.isfinite(self.value):
            raise ValueError(f"a constant is finite, found {self.value}")

    def children(self) -> tuple[Expression, ...]:
        """None: it is a leaf."""
        return ()

    def to_data(self) -> list[Any]:
        """``[spec, value]``."""
        return [spec_to_json(self.spec), self.value]

    @classmethod
    def from_data(cls, data: list[Any]) -> Self:
        """Inverse of `to_data`."""
        spec, value = data
        return cls(spec_from_json(spec), value)


@expression_kind("literal")
@dataclass(frozen=True, slots=True)
class Literal(Expression):
    """A small tensor whose values the plan itself holds, such as a router made from prompts.

    Attributes:
        spec: of the result; the values are rounded once to its dtype.
        values: base64 of the elements as little-endian float32, in row-major order.
    """

    spec: TensorSpec
    values: str

    def __post_init__(self) -> None:
        """Check the number of values.

        Raises:
            ValueError: not base64, or not as many elements as the spec has.
        """
        found, expected = len(self.data), self.spec.num_elements * _LITERAL_ITEMSIZE
        if found != expected:
            raise ValueError(f"{self.spec.name!r} takes {expected} bytes of float32 values, found {found}")

    @classmethod
    def of(cls, spec: TensorSpec, data: bytes) -> Self:
        """From the elements as little-endian float32."""
        return cls(spec, base64.b64encode(data).decode("ascii"))

    @property
    def data(self) -> bytes:
        """The elements as little-endian float32."""
        return base64.b64decode(self.values, validate=True)

    def children(self) -> tuple[Expression, ...]:
        """None: it is a leaf."""
        return ()

    def to_data(self) -> list[Any]:
        """``[spec, values]``."""
        return [spec_to_json(self.spec), self.values]

    @classmethod
    def from_data(cls, data: list[Any]) -> Self:
        """Inverse of `to_data`."""
        spec, values = data
        return cls(spec_from_json(spec), values)


@expression_kind("concat")
@dataclass(frozen=True, slots=True)
class Concat(Expression):
    """Tensors laid end to end: their elements, flattened, one part after the other, seen in the shape of ``spec``.

    With parts of shape ``[n, …]`` and a spec of ``[parts · n, …]`` it is a concatenation along the first dimension;
    with ``[parts, n, …]`` it is a stack.
    """

    parts: tuple[Expression, ...]
    spec: TensorSpec

    def __post_init__(self) -> None:
        """Check that the parts fill the result.

        Raises:
            ValueError: another number of elements, or a part of another dtype.
        """
        found = sum(part.spec.num_elements for part in self.parts)
        if found != self.spec.num_elements:
            raise ValueError(f"{self.spec.name!r} has {self.spec.num_elements} elements, its parts have {found}")
        if any(part.spec.dtype is not self.spec.dtype for part in self.parts):
            raise ValueError(f"{self.spec.name!r} is {self.spec.dtype.value}, and not all of its parts are")

    def overlaps(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """The parts of a run: ``(part, its first element, its last + 1, where that is in the run)``."""
        begin = 0
        for index, part in enumerate(self.parts):
            end = begin + part.spec.num_elements
            first, last = max(start, begin), min(stop, end)
            if first < last:
                yield index, first - begin, last - begin, first - start
            begin = end

    def needs(self, start: int, stop: int) -> Iterator[tuple[Stored, int, int]]:
        """Of every part that the run touches, the elements it touches."""
        for index, first, last, _ in self.overlaps(start, stop):
            yield from self.parts[index].needs(first, last)

    @property
    def access(self) -> Access:
        """The most that any part needs; the whole at once if parts share inputs, which are then read once."""
        shared = Counter(leaf for part in self.parts for leaf in stored(part))
        own = Access.REDUCE if any(count > 1 for count in shared.values()) else Access.ELEMENTWISE
        return most([own, *(part.access for part in self.parts)])

    def children(self) -> tuple[Expression, ...]:
        """The parts."""
        return self.parts

    def to_data(self) -> list[Any]:
        """``[parts, spec]``."""
        return [[to_json(part) for part in self.parts], spec_to_json(self.spec)]

    @classmethod
    def from_data(cls, data: list[Any]) -> Self:
        """Inverse of `to_data`."""
        parts, spec = data
        return cls(tuple(from_json(part) for part in parts), spec_from_json(spec))


def without_values(x: Expression) -> Expression:
    """An expression without what is only known once an input was read, alone or as parts of a `Concat`.

    These are the values of literals, and the size of numbers drawn around a constant: new rows of an existing router
    get the length of its other rows.
    """
    match x:
        case Literal():
            return Constant(x.spec, 0.0)
        case Noise(x=Constant()):
            return replace(x, scale=1.0)
        case Concat():
            return Concat(tuple(map(without_values, x.parts)), x.spec)
    return x

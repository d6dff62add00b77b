"""The other way round: low-rank factors of a matrix, and what they leave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from mergekit_ray.core.declaration import Access
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions.base import Expression, Stored, expression_kind, from_json, to_json
from mergekit_ray.core.tensors import TensorSpec

NUM_NORMS = 2
"""Numbers that follow the factors in the result of `LowRankFactors`."""

_EIGEN_MATRICES = 5
"""Square float64 matrices of the short side held at once: the Gram matrix, its copy, and the solver's workspace."""

_FACTOR_COPIES = 4
"""Of the factors held in float64 at once: as found, scaled, rounded, and put together."""

_FLOAT32_BYTES, _FLOAT64_BYTES = 4, 8


def _short_side(x: Expression) -> int:
    return min(x.spec.shape) if len(x.spec.shape) > 1 else 1


def _eigen_bytes(x: Expression) -> int:
    """Bytes to find singular vectors with: the matrix in float32, and what its Gram matrix needs."""
    return x.spec.num_elements * _FLOAT32_BYTES + _EIGEN_MATRICES * _short_side(x) ** 2 * _FLOAT64_BYTES


@expression_kind("low_rank_factors")
@dataclass(frozen=True, slots=True)
class LowRankFactors(Expression):
    """The best approximation ``b @ a`` of ``x`` (of its transpose, if ``transposed``), and its error.

    With the singular value decomposition ``U S Vᵀ`` cut to ``rank``, ``b = U √S`` and ``a = √S Vᵀ`` (Eckart and Young
    1936). The result is one float32 vector: ``b`` row by row, ``a`` row by row, then the Frobenius norms of what is
    left, ``x − b @ a``, and of ``x``.

    Attributes:
        x: a matrix; of any shape if the rank is 0, where only the norms are asked for.
        rank: at most the short side of ``x``.
        transposed: factorise ``xᵀ``.
        dtype: the factors are rounded to it; the residual is what the rounded factors leave.
    """

    x: Expression
    rank: int
    transposed: bool = False
    dtype: DType = DType.F32

    @property
    def b_shape(self) -> tuple[int, int]:
        """``[outputs, rank]``."""
        return (self._sides[0], self.rank)

    @property
    def a_shape(self) -> tuple[int, int]:
        """``[rank, inputs]``."""
        return (self.rank, self._sides[1])

    @property
    def _sides(self) -> tuple[int, int]:
        if self.rank == 0:
            return (0, 0)
        rows, columns = self.x.spec.shape
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def spec(self) -> TensorSpec:
        """A float32 vector, named as ``x``."""
        return TensorSpec(self.x.spec.name, DType.F32, (self.rank * sum(self._sides) + NUM_NORMS,))

    def children(self) -> tuple[Expression, ...]:
        """``x``."""
        return (self.x,)

    def needs(self, start: int, stop: int) -> Iterator[tuple[Stored, int, int]]:
        """All of ``x``."""
        del start, stop
        yield from self.x.needs(0, self.x.spec.num_elements)

    @property
    def access(self) -> Access:
        """The whole matrix."""
        return Access.WHOLE

    @property
    def scratch_bytes(self) -> int:
        """The matrix, its Gram matrix, and the factors in float64."""
        if self.rank == 0:
            return self.x.scratch_bytes + self.x.spec.num_elements * _FLOAT32_BYTES
        return (
            self.x.scratch_bytes + _eigen_bytes(self.x) + _FACTOR_COPIES * self.rank * sum(self._sides) * _FLOAT64_BYTES
        )

    def to_data(self) -> list[Any]:
        """``[x, rank, transposed, dtype]``."""
        return [to_json(self.x), self.rank, self.transposed, self.dtype.value]

    @classmethod
    def from_data(cls, data: list[Any]) -> Self:
        """Inverse of `to_data`."""
        x, rank, transposed, dtype = data
        return cls(from_json(x), rank, transposed, DType(dtype))


@expression_kind("singular_values")
@dataclass(frozen=True, slots=True)
class SingularValues(Expression):
    """The singular values of a matrix, largest first, in float64: a vector as long as its short side."""

    x: Expression

    @property
    def spec(self) -> TensorSpec:
        """A float64 vector, named as ``x``."""
        return TensorSpec(self.x.spec.name, DType.F64, (_short_side(self.x),))

    def children(self) -> tuple[Expression, ...]:
        """``x``."""
        return (self.x,)

    def needs(self, start: int, stop: int) -> Iterator[tuple[Stored, int, int]]:
        """All of ``x``."""
        del start, stop
        yield from self.x.needs(0, self.x.spec.num_elements)

    @property
    def access(self) -> Access:
        """The whole matrix."""
        return Access.WHOLE

    @property
    def scratch_bytes(self) -> int:
        """The matrix and its Gram matrix."""
        return self.x.scratch_bytes + _eigen_bytes(self.x)

    def to_data(self) -> list[Any]:
        """``[x]``."""
        return [to_json(self.x)]

    @classmethod
    def from_data(cls, data: list[Any]) -> Self:
        """Inverse of `to_data`."""
        (x,) = data
        return cls(from_json(x))

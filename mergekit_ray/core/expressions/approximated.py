"""Rows of an embedding for tokens that a model does not have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from mergekit_ray.core.approximation import APPROXIMATIONS
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions.base import (
    Expression,
    Scalar,
    Stored,
    expression_kind,
    from_json,
    spec_from_json,
    spec_to_json,
    to_json,
)
from mergekit_ray.core.tensors import TensorSpec

_FLOAT32_BYTES = 4


@expression_kind("approximated")
@dataclass(frozen=True, slots=True)
class Approximated(Expression):
    """A row for each token that a model lacks, made of the rows of tokens that it shares with a donor.

    Attributes:
        method: name in the registry of approximations.
        spec: of the result, ``[m, d]``.
        model_shared: the model's rows of the shared tokens, ``[n, d]``; of a method that does not use the donor any of
            its rows. None if the method uses none.
        donor_shared: the donor's rows of the shared tokens in the same order, ``[n, e]``; None if not used.
        donor_missing: the donor's rows of the missing tokens, ``[m, e]``; None if not used.
        parameters: of the method.
        key: names the stream of random numbers.
    """

    method: str
    spec: TensorSpec
    model_shared: Expression | None
    donor_shared: Expression | None
    donor_missing: Expression | None
    parameters: Mapping[str, Scalar]
    key: str = ""

    def __post_init__(self) -> None:
        """Check that the parts fit together.

        Raises:
            ValueError: a part that is no matrix or has another number of rows or columns; or one of the donor's without
                the other.
        """
        parts = [self.spec, *(part.spec for part in self.children())]
        if any(len(part.shape) != 2 or not part.dtype.is_floating for part in parts):
            raise ValueError(f"{self.spec.name!r} is made of matrices of floating numbers")
        rows, columns = self.spec.shape
        if self.model_shared is not None and self.model_shared.spec.shape[1] != columns:
            raise ValueError(f"{self.spec.name!r} has rows of {columns}, those of the model are others")
        if (self.donor_shared is None) != (self.donor_missing is None):
            raise ValueError(f"{self.spec.name!r} takes two matrices of the donor, or none")
        if self.donor_shared is None or self.donor_missing is None:
            return
        shared, missing = self.donor_shared.spec.shape, self.donor_missing.spec.shape
        if shared[1] != missing[1] or missing[0] != rows:
            raise ValueError(f"{self.spec.name!r} is approximated from {list(shared)} and {list(missing)}")
        if self.model_shared is not None and self.model_shared.spec.shape[0] != shared[0]:
            raise ValueError(f"{self.spec.name!r} is approximated from other numbers of rows of model and donor")

    @property
    def row_elements(self) -> int:
        """Elements of a row."""
        return self.spec.shape[1]

    def children(self) -> tuple[Expression, ...]:
        """Those parts that there are, in their order."""
        parts = (self.model_shared, self.donor_shared, self.donor_missing)
        return tuple(part for part in parts if part is not None)

    def needs(self, start: int, stop: int) -> Iterator[tuple[Stored, int, int]]:
        """All shared rows, and those of the missing tokens that the run touches."""
        for part in (self.model_shared, self.donor_shared):
            if part is not None:
                yield from part.needs(0, part.spec.num_elements)
        if self.donor_missing is not None:
            width = self.donor_missing.spec.shape[1]
            first, last = self.rows(start, stop)
            yield from self.donor_missing.needs(first * width, last * width)

    def rows(self, start: int, stop: int) -> tuple[int, int]:
        """The rows that elements ``[start, stop)`` lie in: the first, and the last + 1."""
        size = max(1, self.row_elements)
        return start // size, -(-stop // size)

    @property
    def scratch_bytes(self) -> int:
        """The result in float32, matrices that are not stored as loops take them, and what the method holds."""
        below = sum(child.scratch_bytes for child in self.children())
        shared = [part for part in (self.model_shared, self.donor_shared) if part is not None]
        copied = sum(part.spec.num_elements for part in shared if not is_taken_as_stored(part))
        num_shared = max((part.spec.shape[0] for part in shared), default=0)
        model_width, donor_width = (
            0 if part is None else part.spec.shape[1] for part in (self.model_shared, self.donor_shared)
        )
        held = APPROXIMATIONS.get(self.method).working_bytes(self.parameters, num_shared, model_width, donor_width)
        return below + held + (self.spec.num_elements + copied) * _FLOAT32_BYTES

    @property
    def unit(self) -> int:
        """A row."""
        return max(1, self.row_elements)

    @property
    def propagates_non_finite(self) -> bool:
        """Not where the model's rows are not used."""
        return False

    def to_data(self) -> list[Any]:
        """The attributes in their order."""
        parts = (self.model_shared, self.donor_shared, self.donor_missing)
        return [
            self.method,
            spec_to_json(self.spec),
            *(None if part is None else to_json(part) for part in parts),
            dict(self.parameters),
            self.key,
        ]

    @classmethod
    def from_data(cls, data: list[Any]) -> Self:
        """Inverse of `to_data`."""
        method, spec, *parts, parameters, key = data
        model_shared, donor_shared, donor_missing = (None if part is None else from_json(part) for part in parts)
        return cls(method, spec_from_json(spec), model_shared, donor_shared, donor_missing, parameters, key)


def is_taken_as_stored(x: Expression) -> bool:
    """Whether a matrix is used where it is read, without a copy in float32."""
    return isinstance(x, Stored) and x.spec.dtype in (DType.BF16, DType.F32)

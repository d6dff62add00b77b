"""Rows of stored tensors in any order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from mergekit_ray.core.expressions.base import (
    Load,
    Stored,
    expression_kind,
    from_json,
    spec_from_json,
    spec_to_json,
    to_json,
)
from mergekit_ray.core.expressions.runs import ZEROS, OfRows, Runs
from mergekit_ray.core.tensors import Location, TensorSpec


@expression_kind("gather")
@dataclass(frozen=True, slots=True)
class Gather(OfRows, Stored):
    """Rows of tensors as stored in files, end to end: an embedding in the order of another vocabulary.

    Made by `gathered`, which gives a `Load` where one suffices.

    Attributes:
        parts: what rows are taken of.
        spec: of the result. A bias ``[rows]`` or ``[1, rows]`` has rows of one element.
        runs: which rows, of which parts.
    """

    parts: tuple[Load, ...]
    spec: TensorSpec
    runs: Runs

    @property
    def read_from(self) -> tuple[Load, ...]:
        """The parts."""
        return self.parts

    def read_bytes(self, start: int, stop: int) -> int:
        """See `Stored.read_bytes`: nothing is read for zeros."""
        first, last = self.rows(start, stop)
        part, _, count = self.runs.within(first, last).T
        is_read, size = part != ZEROS, self.row_elements
        if not is_read.any():
            return 0
        cut_off = (start - first * size) * int(is_read[0]) + (last * size - stop) * int(is_read[-1])
        return (int(count[is_read].sum()) * size - cut_off) * self.spec.dtype.itemsize

    def rows(self, start: int, stop: int) -> tuple[int, int]:
        """The rows that elements ``[start, stop)`` lie in: the first, and the last + 1."""
        return start // self.row_elements, -(-stop // self.row_elements)

    def held(self, start: int, stop: int) -> tuple[int, int]:
        """See `Stored.held`: whole rows."""
        first, last = self.rows(start, stop)
        return first * self.row_elements, last * self.row_elements

    def origin(self, element: int) -> tuple[Load, int]:
        """See `Stored.origin`.

        Raises:
            ValueError: the element is in a row of zeros.
        """
        row, within = divmod(element, self.row_elements)
        [[part, first, _]] = self.runs.within(row, row + 1).tolist()
        if part == ZEROS:
            raise ValueError(f"row {row} of {self.spec.name!r} is zeros")
        return self.parts[part], first * self.row_elements + within

    def to_data(self) -> list[Any]:
        """``[parts, spec, runs]``."""
        return [[to_json(part) for part in self.parts], spec_to_json(self.spec), self.runs.to_json()]

    @classmethod
    def from_data(cls, data: list[Any]) -> Self:
        """Inverse of `to_data`."""
        parts, spec, runs = data
        loads = [from_json(part) for part in parts]
        if not all(isinstance(load, Load) for load in loads):
            raise ValueError("rows are gathered from files")
        return cls(tuple(load for load in loads if isinstance(load, Load)), spec_from_json(spec), Runs.from_json(runs))


def gathered(parts: Sequence[Load], spec: TensorSpec, runs: Runs) -> Stored:
    """Rows of stored tensors: a `Load` if they lie in one place, else a `Gather` of the parts that are used.

    Args:
        parts: what rows are taken of.
        spec: of the result.
        runs: which rows, of which parts.

    Raises:
        ValueError: see `Runs.row_elements`.
    """
    size = runs.row_elements(spec, [part.spec for part in parts])
    if len(runs) == 1:
        [(index, first, count)] = runs
        if index != ZEROS:
            part = parts[index]
            width = size * spec.dtype.itemsize
            start = part.location.start + first * width
            place = Location(part.location.file, start, start + count * width)
            return Load(part.model, TensorSpec(part.spec.name, spec.dtype, spec.shape), place)
    used, runs = runs.compact()
    return Gather(tuple(parts[index] for index in used), spec, runs)

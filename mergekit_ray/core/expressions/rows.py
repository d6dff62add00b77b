"""Rows of several tensors, stored or computed, in any order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from mergekit_ray.core.declaration import Access
from mergekit_ray.core.expressions.base import (
    Expression,
    Stored,
    expression_kind,
    from_json,
    most,
    needed,
    spec_from_json,
    spec_to_json,
    stored,
    to_json,
)
from mergekit_ray.core.expressions.runs import OfRows, Runs
from mergekit_ray.core.tensors import TensorSpec

_FLOAT64_BYTES = 8


@expression_kind("rows")
@dataclass(frozen=True, slots=True)
class Rows(OfRows, Expression):
    """Rows of any expressions, end to end: an embedding some of whose rows are computed.

    Made by `rows`, which gives something simpler where that suffices.

    Attributes:
        parts: what rows are taken of.
        spec: of the result. A bias ``[rows]`` or ``[1, rows]`` has rows of one element.
        runs: which rows, of which parts.
    """

    reads_all: ClassVar[bool] = False

    parts: tuple[Expression, ...]
    spec: TensorSpec
    runs: Runs

    def overlaps(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """The runs of elements ``[start, stop)``: ``(part or ZEROS, its first element, its last + 1, where that is)``.

        The place is counted from ``start``.
        """
        size = self.row_elements
        place = start // size * size - start
        for part, row, count in self.runs.within(start // size, -(-stop // size)).tolist():
            first, last = max(place, 0), min(place + count * size, stop - start)
            begin = row * size + first - place
            yield part, begin, begin + last - first, first
            place += count * size

    def needs(self, start: int, stop: int) -> Iterator[tuple[Stored, int, int]]:
        """Of every part, from the first to the last of the rows taken of it; all of it if it has to be seen at once."""
        size = self.row_elements
        for index, (first, last) in self.runs.spans(start // size, -(-stop // size)).items():
            part = self.parts[index]
            if part.access is Access.ELEMENTWISE:
                yield from part.needs(first * size, last * size)
            else:
                yield from part.needs(0, part.spec.num_elements)

    @property
    def access(self) -> Access:
        """The most that any part needs.

        The whole at once if parts share inputs that are read run by run, so that they are read once; or if rows of what
        is read are taken in another order than they have there, so that there is no telling which ones a window needs.
        """
        scattered = (self.parts[index] for index in self.runs.turns)
        is_whole = self._shares_runs() or any(any(True for _ in stored(part)) for part in scattered)
        own = Access.REDUCE if is_whole else Access.ELEMENTWISE
        return most([own, *(part.access for part in self.parts)])

    def _shares_runs(self) -> bool:
        """Whether several parts have an input that is not read as a whole for each row, as a LoRA's first factor is."""
        leaves = [set(stored(part)) for part in self.parts]
        uses = Counter(leaf for of_part in leaves for leaf in of_part)
        shared = {leaf for leaf, count in uses.items() if count > 1}
        for part, of_part in zip(self.parts, leaves, strict=True):
            if of_part & shared:
                of_row = needed(part, 0, self.row_elements)
                if any(of_row.get(leaf) != (0, leaf.spec.num_elements) for leaf in of_part & shared):
                    return True
        return False

    @property
    def chunk_bytes(self) -> int:
        """Beside those of the parts, their rows side by side, twice, before they come to their places."""
        return super(Rows, self).chunk_bytes + 2 * _FLOAT64_BYTES

    @property
    def unit(self) -> int:
        """A row."""
        return self.row_elements

    def children(self) -> tuple[Expression, ...]:
        """The parts."""
        return self.parts

    def to_data(self) -> list[Any]:
        """``[parts, spec, runs]``."""
        return [[to_json(part) for part in self.parts], spec_to_json(self.spec), self.runs.to_json()]

    @classmethod
    def from_data(cls, data: list[Any]) -> Self:
        """Inverse of `to_data`."""
        parts, spec, runs = data
        return cls(tuple(from_json(part) for part in parts), spec_from_json(spec), Runs.from_json(runs))

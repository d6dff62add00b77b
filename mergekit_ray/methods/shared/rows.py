"""Statistics of the rows or columns of a tensor that is seen in runs of elements which do not end where rows do.

A run of the elements of a matrix, which lie row by row, is at most three rectangles: the rest of a row, whole rows, the
beginning of a row. On each of them torch works row by row or column by column by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_ray.methods.shared.protocol import Chunk, Operands
from mergekit_ray.methods.shared.sums import partial_sums

if TYPE_CHECKING:
    import torch

_LONG_ROW = 1 << 14
"""Longer rows are summed in runs, so that torch does not split one over its threads."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a matrix within a run of its elements.

    Attributes:
        place: of its first element in the run.
        rows, columns: of the matrix.
    """

    place: int
    rows: slice
    columns: slice

    def of(self, run: torch.Tensor) -> torch.Tensor:
        """Its elements in ``run``, as a 2-D view."""
        num_rows, num_columns = self.rows.stop - self.rows.start, self.columns.stop - self.columns.start
        return run[self.place : self.place + num_rows * num_columns].view(num_rows, num_columns)


def pieces(start: int, stop: int, row_length: int) -> list[Piece]:
    """The rectangles, up to three, that elements ``[start, stop)`` of a matrix consist of, in order."""
    found = []
    place = start
    while place < stop:
        row, column = divmod(place, row_length)
        whole_rows = (stop - place) // row_length
        if column or not whole_rows:
            until = min(row_length, column + stop - place)
            found.append(Piece(place - start, slice(row, row + 1), slice(column, until)))
            place += until - column
        else:
            found.append(Piece(place - start, slice(row, row + whole_rows), slice(0, row_length)))
            place += whole_rows * row_length
    return found


def row_sums(values: torch.Tensor) -> torch.Tensor:
    """Sums along the rows of a float64 matrix: the same for any number of threads."""
    import torch  # noqa: PLC0415 - declarations are read without torch

    if values.shape[1] <= _LONG_ROW:
        return values.sum(dim=1)
    return torch.stack([partial_sums(row, row).sum() for row in values])


@dataclass(frozen=True, slots=True)
class Lines:
    """The parallel vectors that a tensor is taken apart into: the rows, or the columns, of a matrix.

    Attributes:
        num_rows, num_columns: of the matrix.
        are_rows: whether each row is a vector, or each column.
    """

    num_rows: int
    num_columns: int
    are_rows: bool

    @classmethod
    def along_last(cls, shape: tuple[int, ...]) -> Lines:
        """Vectors along the last dimension; a vector or scalar is one."""
        return cls(math.prod(shape[:-1]), shape[-1] if shape else 1, are_rows=True)

    @classmethod
    def along_first(cls, shape: tuple[int, ...]) -> Lines:
        """Vectors along the first dimension; a vector or scalar is one."""
        return cls(shape[0] if shape else 1, math.prod(shape[1:]), are_rows=False)

    @property
    def num_lines(self) -> int:
        """How many vectors there are."""
        return self.num_rows if self.are_rows else self.num_columns

    def matched(
        self, run: torch.Tensor, start: int, values: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The rectangles of ``run``, each with those of ``values`` that belong to its lines, shaped to broadcast.

        Args:
            run: 1-D, elements from flat index ``start`` on.
            start: flat index of its first element.
            values: one per line.
        """
        for piece in pieces(start, start + run.numel(), self.num_columns):
            if self.are_rows:
                yield piece.of(run), values[piece.rows].unsqueeze(1)
            else:
                yield piece.of(run), values[piece.columns].unsqueeze(0)

    def scale_(self, run: torch.Tensor, start: int, factors: torch.Tensor) -> torch.Tensor:
        """Multiply each element by the factor of its line, in place; arguments as for `matched`."""
        for part, factor in self.matched(run, start, factors):
            part.mul_(factor)
        return run

    def sums(
        self, operands: Operands, terms: Callable[[Chunk], Iterable[torch.Tensor]], num_terms: int
    ) -> torch.Tensor:
        """Sums along the lines of what ``terms`` gives: float64, of shape ``(num_terms, num_lines)``.

        Args:
            operands: the tensor; not empty.
            terms: gives 1-D float64 runs, each used before the next is asked for.
            num_terms: how many.
        """
        return (self._sums_of_rows if self.are_rows else self._sums_of_columns)(operands, terms, num_terms)

    def _sums_of_rows(
        self, operands: Operands, terms: Callable[[Chunk], Iterable[torch.Tensor]], num_terms: int
    ) -> torch.Tensor:
        import torch  # noqa: PLC0415

        def measure(chunk: Chunk) -> list[tuple[Piece, list[torch.Tensor]]]:
            cut = pieces(chunk.start, chunk.stop, self.num_columns)
            by_term = [[row_sums(piece.of(term)) for piece in cut] for term in terms(chunk)]
            return [(piece, [sums[place] for sums in by_term]) for place, piece in enumerate(cut)]

        blocks = operands.map_blocks(measure)
        device = blocks[0][0][1][0].device
        summed = torch.zeros(num_terms, self.num_lines, dtype=torch.float64, device=device)
        for block in blocks:
            for piece, by_term in block:
                for term, sums in enumerate(by_term):
                    summed[term, piece.rows] += sums
        return summed

    def _sums_of_columns(
        self, operands: Operands, terms: Callable[[Chunk], Iterable[torch.Tensor]], num_terms: int
    ) -> torch.Tensor:
        """Block after block: each may touch all columns, so that kept apart they would take more than the tensor."""
        import torch  # noqa: PLC0415

        summed: list[torch.Tensor] = []

        def add(chunk: Chunk) -> None:
            cut = pieces(chunk.start, chunk.stop, self.num_columns)
            for index, term in enumerate(terms(chunk)):
                if index == len(summed):
                    summed.append(torch.zeros(self.num_lines, dtype=torch.float64, device=term.device))
                for piece in cut:
                    summed[index][piece.columns] += piece.of(term).sum(dim=0)

        for index in range(-(-operands.num_elements // operands.block_elements)):
            operands.block(index, add)
        assert len(summed) == num_terms
        return torch.stack(summed)

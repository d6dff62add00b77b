"""Which rows of which parts a tensor is made of, end to end: a vocabulary's rows in another's order."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

from mergekit_ray.core.tensors import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from mergekit_ray.core.expressions.base import Expression

    Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

ZEROS: Final = -1
"""Stands for a part whose rows are zeros."""

_RUN_BYTES: Final = 12
"""Part, first row and number of rows, 32 bits each."""


@dataclass(frozen=True)
class Runs:
    """Rows end to end, as runs ``(part, first row, number of rows)``; the part is an index, or `ZEROS`.

    A vocabulary in another's order may be a run for each of its rows, so they are held as bytes and looked at by numpy,
    which is imported only then.

    Attributes:
        data: little-endian 32-bit integers, three for each run.
    """

    data: bytes

    @classmethod
    def of(cls, runs: Iterable[tuple[int, int, int]]) -> Self:
        """From runs; empty ones are left out, and what follows on in the same part is one.

        Raises:
            ValueError: a number is negative or does not fit in 32 bits.
        """
        import numpy as np  # noqa: PLC0415 - plans are made without it, but for these

        return cls._of(np.array(list(runs), np.int64).reshape(-1, 3))

    @classmethod
    def of_rows(cls, parts: Sequence[int] | Integers, rows: Sequence[int] | Integers) -> Self:
        """From single rows: the part of each, and its index there.

        Raises:
            ValueError: as `of`.
        """
        import numpy as np  # noqa: PLC0415 - as above

        found = np.ones((len(rows), 3), np.int64)
        found[:, 0], found[:, 1] = parts, rows
        return cls._of(found)

    @classmethod
    def _of(cls, found: Integers) -> Self:
        import numpy as np  # noqa: PLC0415 - as above

        if found.size and (found.max() >= 1 << 31 or found[:, 1:].min() < 0 or found[:, 0].min() < ZEROS):
            raise ValueError("a run is a part, its first row and a number of rows, each 0 or more and below 2^31")
        found = found[found[:, 2] > 0]
        found[found[:, 0] == ZEROS, 1] = 0
        part, first, count = found.T
        follows_on = (part[1:] == part[:-1]) & ((first[1:] == first[:-1] + count[:-1]) | (part[1:] == ZEROS))
        begins = np.flatnonzero(np.concatenate([[True], ~follows_on])[: len(found)])
        merged = found[begins]
        if len(merged):
            merged[:, 2] = np.add.reduceat(count, begins)
        return cls(merged.astype("<i4").tobytes())

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of `to_json`.

        Raises:
            ValueError: not base64, or no whole number of runs.
        """
        data = base64.b64decode(text, validate=True)
        if len(data) % _RUN_BYTES:
            raise ValueError(f"runs take {_RUN_BYTES} bytes each, found {len(data)}")
        return cls(data)

    def to_json(self) -> str:
        """Base64 of the data."""
        return base64.b64encode(self.data).decode("ascii")

    def __reduce__(self) -> tuple[type[Self], tuple[bytes]]:
        """Pickled without what is made of the data."""
        return type(self), (self.data,)

    def __repr__(self) -> str:
        return f"<Runs: {len(self)}>"

    def __len__(self) -> int:
        return len(self.data) // _RUN_BYTES

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        yield from map(tuple, self.table.tolist())

    @cached_property
    def table(self) -> Integers:
        """The runs, ``[runs, 3]``."""
        import numpy as np  # noqa: PLC0415 - as above

        return np.frombuffer(self.data, "<i4").reshape(-1, 3).astype(np.int64)

    @cached_property
    def places(self) -> Integers:
        """Where each run begins in the result, and last the number of rows of all."""
        import numpy as np  # noqa: PLC0415 - as above

        return np.concatenate([[0], np.cumsum(self.table[:, 2])])

    @property
    def num_rows(self) -> int:
        """Of the result."""
        return int(self.places[-1])

    def within(self, start: int, stop: int) -> Integers:
        """The runs of rows ``[start, stop)`` of the result, those at the ends cut to them: ``[runs, 3]``."""
        import numpy as np  # noqa: PLC0415 - as above

        if start >= stop:
            return self.table[:0]
        first, last = self._run_of(start), self._run_of(stop - 1)
        found = self.table[first : last + 1].copy()
        begins = np.maximum(self.places[first : last + 1], start)
        found[:, 1] += begins - self.places[first : last + 1]
        found[:, 2] = np.minimum(self.places[first + 1 : last + 2], stop) - begins
        return found

    def rows(self, start: int, stop: int) -> tuple[Integers, Integers]:
        """Of each of the rows ``[start, stop)`` of the result, its part and its index there."""
        import numpy as np  # noqa: PLC0415 - as above

        part, first, count = self.within(start, stop).T
        within = np.arange(stop - start) - np.repeat(np.cumsum(count) - count, count)
        return np.repeat(part, count), np.repeat(first, count) + within

    def spans(self, start: int, stop: int) -> dict[int, tuple[int, int]]:
        """Of each part that rows ``[start, stop)`` of the result have rows of, the first of them and the last + 1."""
        part, first, count = self.within(start, stop).T
        found = {}
        for index in sorted(set(part.tolist()) - {ZEROS}):
            of_part = part == index
            found[index] = int(first[of_part].min()), int((first + count)[of_part].max())
        return found

    @cached_property
    def turns(self) -> dict[int, int]:
        """Of each part whose rows do not come in the order that they have there, how often they go back."""
        import numpy as np  # noqa: PLC0415 - as above

        part, first, count = self.table[np.argsort(self.table[:, 0], kind="stable")].T
        goes_back = (part[1:] == part[:-1]) & (first[1:] < first[:-1] + count[:-1] - 1) & (part[1:] != ZEROS)
        return dict(Counter(part[1:][goes_back].tolist()))

    def compact(self) -> tuple[list[int], Runs]:
        """The parts that rows are taken of, ascending, and the same runs with their places in that list for parts."""
        import numpy as np  # noqa: PLC0415 - as above

        used = sorted(set(self.table[:, 0].tolist()) - {ZEROS})
        if used == list(range(len(used))):
            return used, self
        found = self.table.copy()
        is_read = found[:, 0] != ZEROS
        found[is_read, 0] = np.searchsorted(used, found[is_read, 0])
        return used, self._of(found)

    def _run_of(self, row: int) -> int:
        import numpy as np  # noqa: PLC0415 - as above

        return int(np.searchsorted(self.places, row, side="right")) - 1

    def row_elements(self, spec: TensorSpec, parts: Sequence[TensorSpec]) -> int:
        """Elements of a row, seen to be the same in the result and in all parts.

        Rows are along the first dimension, or along the second of ``[1, rows]``, as some biases are stored.

        Raises:
            ValueError: the runs do not fill the result or lie outside of their parts; or a part has rows of another
                size, or another dtype.
        """
        import numpy as np  # noqa: PLC0415 - as above

        size = math.prod(spec.shape[1:]) if spec.shape != (1, self.num_rows) else 1
        if _num_rows(spec, size) != self.num_rows:
            raise ValueError(f"{spec.name!r} is {list(spec.shape)}, and its runs have {self.num_rows} rows")
        part, first, count = self.table.T
        if len(self) and (part.min() < ZEROS or part.max() >= len(parts) or first.min() < 0 or count.min() < 1):
            raise ValueError(f"{spec.name!r} has runs that are none of its {len(parts)} parts")
        ends = np.zeros(len(parts), np.int64)
        is_read = part != ZEROS
        np.maximum.at(ends, part[is_read], (first + count)[is_read])
        for each, end in zip(parts, ends.tolist(), strict=True):
            if each.dtype is not spec.dtype:
                raise ValueError(f"{spec.name!r} is {spec.dtype.value}, and its part {each.name!r} {each.dtype.value}")
            num_rows = _num_rows(each, size)
            if num_rows is None:
                raise ValueError(f"{spec.name!r} has rows of {size} elements, and its part is {list(each.shape)}")
            if end > num_rows:
                raise ValueError(f"{spec.name!r} takes row {end - 1} of {each.name!r}, which has {num_rows}")
        return size


def _num_rows(spec: TensorSpec, size: int) -> int | None:
    """Rows of so many elements that a tensor has; None if its rows are others."""
    if len(spec.shape) == 2 and spec.shape[0] == 1 and size == 1:
        return spec.shape[1]
    return (spec.shape or (1,))[0] if math.prod(spec.shape[1:]) == size else None


class OfRows:
    """What expressions that take rows of parts share: their ``parts``, ``spec`` and ``runs`` fit together."""

    __slots__ = ()

    if TYPE_CHECKING:

        @property
        def parts(self) -> Sequence[Expression]: ...  # noqa: D102 - see the class
        @property
        def spec(self) -> TensorSpec: ...  # noqa: D102 - see the class
        @property
        def runs(self) -> Runs: ...  # noqa: D102 - see the class

    def __post_init__(self) -> None:
        """Check that the runs fill the result from rows that the parts have.

        Raises:
            ValueError: see `Runs.row_elements`.
        """
        self.runs.row_elements(self.spec, [part.spec for part in self.parts])

    @property
    def row_elements(self) -> int:
        """Elements of a row."""
        return max(1, self.spec.num_elements // max(1, self.runs.num_rows))

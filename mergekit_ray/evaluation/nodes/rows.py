"""Rows of several tensors in any order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from mergekit_ray.core.expressions import ZEROS, Rows
from mergekit_ray.evaluation.nodes.base import Compilation, Guard, Node, node_of

if TYPE_CHECKING:
    from mergekit_ray.core.expressions.runs import Integers

_MIN_ROWS: Final = 4
"""Of fewer in a chunk, each run is computed by itself."""

_MAX_SPREAD: Final = 2
"""How many rows of a part may be computed for each that is taken."""


@node_of(Rows)
class RowsNode:
    """Fills each run of rows from the part it belongs to."""

    def __init__(self, rows: Rows, compilation: Compilation, guard: Guard) -> None:
        self.spec = rows.spec
        self._rows = rows
        # A window has the inputs of the parts it touches, and no others.
        self._parts: dict[int, Node] = {
            index: compilation.compile(part) for index, part in enumerate(rows.parts) if compilation.has_inputs(part)
        }
        self._pool = compilation.pool
        self._guard = guard

    def prepare(self) -> None:
        """Prepares the parts of this window."""
        for part in self._parts.values():
            part.prepare()

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        """See `Node.fill`."""
        size = self._rows.row_elements
        first, last = -(-start // size), stop // size
        done = self._fill_together(first, last, out[first * size - start :]) if last - first >= _MIN_ROWS else set()
        scratch = self._pool.scratch
        for index, low, high, place in self._rows.overlaps(start, stop):
            is_row = place + start >= first * size and place + start + high - low <= last * size
            if is_row and index in done:
                continue
            target = out[place : place + high - low]
            if index == ZEROS:
                target.zero_()
                continue
            mark = scratch.mark()
            self._parts[index].fill(low, high, target)
            scratch.release(mark)
        if self._guard.result:
            self._guard.check(out)

    def _fill_together(self, start: int, stop: int, out: torch.Tensor) -> set[int]:
        """Of parts whose rows lie near each other, compute all at once, and bring them to their places.

        Args:
            start: first of the rows.
            stop: the last + 1.
            out: begins with them.

        Returns:
            These parts.
        """
        part, row = self._rows.runs.rows(start, stop)
        size, scratch = self._rows.row_elements, self._pool.scratch
        lines = out[: (stop - start) * size].view(stop - start, size)
        done = set()
        for index in np.unique(part).tolist():
            places = np.flatnonzero(part == index)
            rows = row[places]
            first, last = int(rows.min()), int(rows.max()) + 1
            in_order = bool((np.diff(rows) == 1).all())
            is_one_run = in_order and places[-1] - places[0] + 1 == len(places)
            if index == ZEROS or is_one_run or last - first > min(_MAX_SPREAD * len(rows), len(lines)):
                continue
            mark = scratch.mark()
            values = scratch.take((last - first) * size, out.dtype)
            self._parts[index].fill(first * size, last * size, values)
            computed = values.view(-1, size)
            lines.index_copy_(0, self._there(places), computed if in_order else computed[self._there(rows - first)])
            scratch.release(mark)
            done.add(index)
        return done

    def _there(self, indices: Integers) -> torch.Tensor:
        """Indices where this is computed."""
        return torch.from_numpy(indices).to(self._pool.device)

"""Rows of several tensors in any order."""

from __future__ import annotations

import torch

from mergekit_ray.core.expressions import ZEROS, Rows
from mergekit_ray.evaluation.nodes.base import Compilation, Guard, Node, node_of


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
        scratch = self._pool.scratch
        for index, first, last, place in self._rows.overlaps(start, stop):
            target = out[place : place + last - first]
            if index == ZEROS:
                target.zero_()
                continue
            mark = scratch.mark()
            self._parts[index].fill(first, last, target)
            scratch.release(mark)
        if self._guard.result:
            self._guard.check(out)

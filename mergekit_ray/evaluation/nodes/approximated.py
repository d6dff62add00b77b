"""Rows of missing tokens: runs a method over batches of rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from mergekit_ray.core.expressions import Approximated, Expression, Stored
from mergekit_ray.core.expressions.approximated import is_taken_as_stored
from mergekit_ray.evaluation.nodes.base import Compilation, Guard, Node, fill_parallel, node_of, round_result
from mergekit_ray.evaluation.noise import normal_numbers
from mergekit_ray.methods.approximation.protocol import Shared, approximation
from mergekit_ray.methods.shared.stored_rows import Rows


@node_of(Approximated)
class ApproximatedNode:
    """All rows of a window, computed before the first is asked for where a method works on many at a time."""

    def __init__(self, node: Approximated, compilation: Compilation, guard: Guard) -> None:
        self.spec = node.spec
        self._node = node
        self._compilation = compilation
        self._pool = compilation.pool
        self._guard = guard
        self._method = approximation(node.method, node.parameters, partial(normal_numbers, node.key))
        self._shared = [
            None if part is None else (part, compilation.compile(part))
            for part in (node.model_shared, node.donor_shared)
        ]
        self._missing = None if node.donor_missing is None else compilation.compile(node.donor_missing)
        self._fitted: Any = None
        self._first = 0
        self._result = torch.empty(0)

    def prepare(self) -> None:
        """What all rows have in common; and the rows, if the method has to see the donor's."""
        self._fitted = self._method.fit(Shared(*map(self._rows, self._shared)))
        if self._missing is None or self._node.donor_missing is None:
            return
        self._missing.prepare()
        columns = max(1, self._node.donor_missing.spec.shape[1])
        start, stop = _present(self._node.donor_missing, self._compilation)
        first, last = -(-start // columns), stop // columns
        width, size = self._node.row_elements, self._method.batch_rows
        result = torch.empty(last - first, width)

        def run(low: int, high: int) -> None:
            for begin in range(first + low * size, min(first + high * size, last), size):
                end = min(begin + size, last)
                out = result[begin - first : end - first]
                self._method.approximate(self._fitted, self._targets(begin, end), begin, out)

        self._pool.map_runs(-(-(last - first) // size), run)
        self._first, self._result = first * width, result.view(-1)

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        """See `Node.fill`."""
        first, last = self._node.rows(start, stop)
        if self._missing is None:
            rows = torch.empty(last - first, self._node.row_elements)
            self._method.approximate(self._fitted, None, first, rows)
            values = rows.view(-1)[start - first * rows.shape[1] :][: stop - start]
        else:
            values = self._result[start - self._first : stop - self._first]
        round_result(values, self.spec.dtype, out, self._pool.scratch, self._guard)

    def _targets(self, start: int, stop: int) -> torch.Tensor:
        assert self._missing is not None
        width = self._missing.spec.shape[1]
        targets = torch.empty((stop - start) * width)
        scratch = self._pool.scratch
        mark = scratch.mark()
        self._missing.fill(start * width, stop * width, targets)
        scratch.release(mark)
        return targets.view(stop - start, width)

    def _rows(self, part: tuple[Expression, Node] | None) -> Rows | None:
        if part is None:
            return None
        expression, node = part
        count, shape = expression.spec.num_elements, expression.spec.shape
        if isinstance(expression, Stored) and is_taken_as_stored(expression):
            return Rows.of(self._compilation.pieces[expression].run(0, count).view(shape))
        node.prepare()
        whole = torch.empty(count)
        fill_parallel(node, 0, count, whole, self._pool)
        return Rows(whole.view(shape))


def _present(x: Expression, compilation: Compilation) -> tuple[int, int]:
    """The elements of an expression for which there are inputs: those of the parts that have as many elements."""
    if isinstance(x, Stored):
        piece: Any = compilation.pieces[x]
        return piece.start, piece.start + piece.data.numel()
    parts = [child for child in x.children() if child.spec.num_elements == x.spec.num_elements]
    runs = [_present(part, compilation) for part in parts]
    return max((start for start, _ in runs), default=0), min((stop for _, stop in runs), default=x.spec.num_elements)

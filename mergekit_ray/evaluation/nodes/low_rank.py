"""Low-rank changes of a matrix, filled run by run.

Everything is summed in float64: products of two float32 (or narrower) numbers are exact there. Each element is its own
sum over the rank, in the order of the rank, then scaled, then added to the base, then rounded once. So it does not
depend on which run it is asked for in, nor on the machine, and lies within an ulp of what any order of summing gives.

Devices other than the CPU do the same by torch's operations, element by element in the order of the rank: their own
products of matrices sum in orders that depend on the shape, and so on the run. Only norms are summed in another order
there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mergekit_ray.core.expressions import LowRank
from mergekit_ray.evaluation.nodes.base import Compilation, Guard, Node, node_of, round_result
from mergekit_ray.evaluation.pool import CHUNK_ELEMENTS
from mergekit_ray.evaluation.rounding import round_into
from mergekit_ray.evaluation.scratch import TORCH_DTYPES
from mergekit_ray.methods.compiled.jit import compiled
from mergekit_ray.methods.shared.rows import Lines, pieces

Floats = np.ndarray[Any, np.dtype[np.float64]]

_TILE = 512
"""Columns summed at a time, whose sums stay in the first-level cache."""

_LANES = 16
"""Independent partial sums of a norm, which the processor adds in parallel. Part of the result: the same everywhere."""


@compiled
def add_product(out: Floats, start: int, left: Floats, right: Floats, scale: float) -> None:
    """``out += scale · (left @ right)`` over a run of the flattened product.

    Args:
        out: elements ``[start, start + size)`` of the product's shape, changed in place.
        start: flat index, counted from the first row of ``left``.
        left: ``[rows, rank]``, at least the rows the run touches.
        right: ``[rank, columns]``.
        scale: of the product.
    """
    rank, columns = right.shape
    stop = start + out.size
    sums = np.empty(_TILE)
    for tile in range(0, columns, _TILE):
        tile_stop = min(tile + _TILE, columns)
        for row in range(start // columns, (stop + columns - 1) // columns):
            first = max(start - row * columns, tile)
            last = min(stop - row * columns, tile_stop)
            if first >= last:
                continue
            part = sums[: last - first]
            part[:] = 0.0
            quads = rank - rank % 4
            for k in range(0, quads, 4):
                # Four at a time saves loads and stores; the order of the additions stays that of the rank.
                b0, b1, b2, b3 = left[row, k], left[row, k + 1], left[row, k + 2], left[row, k + 3]
                a0, a1 = right[k, first:last], right[k + 1, first:last]
                a2, a3 = right[k + 2, first:last], right[k + 3, first:last]
                for i in range(part.size):
                    part[i] = part[i] + b0 * a0[i] + b1 * a1[i] + b2 * a2[i] + b3 * a3[i]
            for k in range(quads, rank):
                factor, line = left[row, k], right[k, first:last]
                for i in range(part.size):
                    part[i] += factor * line[i]
            run = out[row * columns + first - start : row * columns + last - start]
            for i in range(part.size):
                run[i] += scale * part[i]


@compiled
def row_norms(out: Floats, values: Floats) -> None:
    """The Euclidean norm of each row; 1 for a row of zeros, which stays zero whatever it is divided by.

    Args:
        out: ``[rows]``.
        values: ``[rows, columns]``.
    """
    lanes = np.empty(_LANES)
    for row in range(out.size):
        line = values[row]
        lanes[:] = 0.0
        even = line.size // _LANES * _LANES
        for start in range(0, even, _LANES):
            for lane in range(_LANES):
                lanes[lane] += line[start + lane] * line[start + lane]
        for i in range(even, line.size):
            lanes[0] += line[i] * line[i]
        total = 0.0
        for lane in range(_LANES):
            total += lanes[lane]
        out[row] = np.sqrt(total) if total != 0.0 else 1.0


@compiled
def add_squares(sums: Floats, values: Floats) -> None:
    """Add the square of each element of ``values``, ``[rows, columns]``, to its column's sum, row after row."""
    for row in range(values.shape[0]):
        line = values[row]
        for i in range(sums.size):
            sums[i] += line[i] * line[i]


@compiled
def scale_columns(values: Floats, start: int, factors: Floats) -> None:
    """Multiply elements ``[start, start + size)`` of a flattened matrix by the factors of their columns."""
    column = start % factors.size
    for i in range(values.size):
        values[i] *= factors[column]
        column = column + 1 if column + 1 < factors.size else 0


def add_product_by_torch(out: torch.Tensor, start: int, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """`add_product` on any device."""
    for piece in pieces(start, start + out.numel(), right.shape[1]):
        summed, product = torch.zeros_like(piece.of(out)), torch.empty_like(piece.of(out))
        for k in range(len(right)):
            # Two steps, each rounded: `addcmul` is one on some devices.
            summed.add_(torch.mul(left[piece.rows, k : k + 1], right[k : k + 1, piece.columns], out=product))
        piece.of(out).add_(summed.mul_(scale))


@node_of(LowRank)
class LowRankNode:
    """Adds a product of two thin matrices to a run, row by row; never more of it than the run."""

    def __init__(self, node: LowRank, compilation: Compilation, guard: Guard) -> None:
        self.spec = node.spec
        self._rows, self._columns = node.spec.shape
        self._scale, self._transposed = float(node.scale), node.transposed
        self._x = compilation.compile(node.x)
        self._a, self._b = compilation.compile(node.a), compilation.compile(node.b)
        self._magnitude = None if node.magnitude is None else compilation.compile(node.magnitude)
        self._selected = node.selected
        self._pool = compilation.pool
        self._guard = guard
        self._left = self._right = self._factors = torch.empty(0)

    def prepare(self) -> None:
        """Widens the factor that all rows share, and takes the norms of columns where a DoRA needs them."""
        for child in (self._x, self._a, self._b, self._magnitude):
            if child is not None:
                child.prepare()
        if self._transposed:
            # (b @ a)ᵀ = aᵀ @ bᵀ
            self._left, self._right = self._whole(self._a).t(), self._whole(self._b).t().contiguous()
            if self._selected is not None:
                _, columns = self._selected.rows(0, self._rows)
                self._left = self._left[torch.from_numpy(columns).to(self._pool.device)]
            if self._magnitude is not None:
                self._factors = self._whole(self._magnitude) / self._column_norms()
        else:
            self._right = self._whole(self._a)

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        """See `Node.fill`."""
        scratch = self._pool.scratch
        mark = scratch.mark()
        if self._magnitude is not None and not self._transposed:
            values = self._scaled_rows(start, stop)
        else:
            values = self._added(start, stop)
            if self._magnitude is not None:
                self._scale_columns(values, start)
        if out.dtype.itemsize < TORCH_DTYPES[self.spec.dtype].itemsize:
            round_into(values, out, scratch)  # for a caller that computes in 16 bits: still one rounding
        else:
            round_result(values, self.spec.dtype, out, scratch, self._guard)
        scratch.release(mark)

    def _added(self, start: int, stop: int) -> torch.Tensor:
        """Elements ``[start, stop)`` in float64, before any norm is applied."""
        scratch = self._pool.scratch
        values = scratch.take(stop - start, torch.float64)
        self._x.fill(start, stop, values)
        left, first = self._left, 0
        if not self._transposed:
            rank, first = self._right.shape[0], start // self._columns
            last = -(-stop // self._columns)
            rows = scratch.take((last - first) * rank, torch.float64)
            self._b.fill(first * rank, last * rank, rows)
            left = rows.view(last - first, rank)
        offset = start - first * self._columns
        if values.device.type == "cpu":
            add_product(values.numpy(), offset, left.numpy(), self._right.numpy(), self._scale)
        else:
            add_product_by_torch(values, offset, left, self._right, self._scale)
        return values

    def _scale_columns(self, values: torch.Tensor, start: int) -> None:
        if values.device.type == "cpu":
            scale_columns(values.numpy(), start, self._factors.numpy())
        else:
            Lines(self._rows, self._columns, are_rows=False).scale_(values, start, self._factors)

    def _scaled_rows(self, start: int, stop: int) -> torch.Tensor:
        """Elements ``[start, stop)`` of rows scaled to their norms, for which whole rows are computed."""
        assert self._magnitude is not None
        first, last = start // self._columns, -(-stop // self._columns)
        values = self._added(first * self._columns, last * self._columns)
        rows = values.view(last - first, self._columns)
        factors, norms = (self._pool.scratch.take(last - first, torch.float64) for _ in range(2))
        if rows.device.type == "cpu":
            row_norms(norms.numpy(), rows.numpy())
        else:
            norms.copy_(torch.linalg.vector_norm(rows, dim=1)).masked_fill_(norms == 0, 1.0)
        self._magnitude.fill(first, last, factors)
        rows.mul_(factors.div_(norms)[:, None])
        return values[start - first * self._columns : stop - first * self._columns]

    def _column_norms(self) -> torch.Tensor:
        """The norm of each column, added row after row; 1 for a column of zeros, which stays zero."""
        scratch = self._pool.scratch
        squares = torch.zeros(self._columns, dtype=torch.float64, device=self._pool.device)
        step = max(1, CHUNK_ELEMENTS // self._columns)
        for first in range(0, self._rows, step):
            mark = scratch.mark()
            try:
                last = min(first + step, self._rows)
                values = self._added(first * self._columns, last * self._columns)
                rows = values.view(last - first, self._columns)
                if rows.device.type == "cpu":
                    add_squares(squares.numpy(), rows.numpy())
                else:
                    squares.add_(rows.square().sum(dim=0))
            finally:
                scratch.release(mark)
        norms = squares.sqrt_()
        return norms.masked_fill_(norms == 0, 1.0)

    def _whole(self, node: Node) -> torch.Tensor:
        """All of a factor in float64, in its shape."""
        whole = torch.empty(node.spec.num_elements, dtype=torch.float64, device=self._pool.device)
        node.fill(0, node.spec.num_elements, whole)
        return whole.view(node.spec.shape)

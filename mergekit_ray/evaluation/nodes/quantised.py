"""Codes with scales -> float32.

Codes become numbers by moving their bits into those of a float16, whose exponent is wide enough for every one of them,
and multiplying by the power of two that the exponents' biases differ by: exact, and measured on one core about ten
times as fast as torch's own conversion and twice as fast as a table of 256 numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import BlockScaled, Mxfp4
from mergekit_ray.core.expressions.quantised import E8M0_NON_FINITE, MXFP4_GROUP_BYTES, BlockGrid
from mergekit_ray.evaluation.nodes.base import Compilation, Guard, Loaded, node_of
from mergekit_ray.evaluation.rounding import round_into
from mergekit_ray.evaluation.scratch import ThreadScratch

_GROUP = 2 * MXFP4_GROUP_BYTES


def _e8m0_values() -> torch.Tensor:
    """``2^(code - 127)`` for every code. The smallest is no normal number of float32, but exact."""
    values = torch.pow(2.0, torch.arange(256, dtype=torch.float64) - 127.0).to(torch.float32)
    values[list(E8M0_NON_FINITE)] = torch.nan
    return values


_E8M0 = _e8m0_values()


@functools.lru_cache(maxsize=16)
def _e8m0_on(device: torch.device) -> torch.Tensor:
    """`_E8M0` where it is needed."""
    return _E8M0.to(device)


class _Decoder:
    """What both nodes share: values are made in float32, looked at, and rounded where the caller wants less."""

    def __init__(self, compilation: Compilation, guard: Guard) -> None:
        self._pool = compilation.pool
        self._guard = guard

    def _decode(self, start: int, stop: int, out: torch.Tensor, scratch: ThreadScratch) -> None:
        """Write elements ``[start, stop)`` to ``out``, float32."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Nothing: codes and scales are there."""

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        """See `Node.fill`."""
        scratch = self._pool.scratch
        mark = scratch.mark()
        values = out if out.dtype == torch.float32 else scratch.take(stop - start, torch.float32)
        self._decode(start, stop, values, scratch)
        if self._guard.inputs or self._guard.result:
            self._guard.check(values)
        if values is not out:
            round_into(values, out, scratch)
        scratch.release(mark)


@node_of(BlockScaled)
class BlockScaledNode(_Decoder):
    """8-bit floats times the scales of their blocks."""

    def __init__(self, node: BlockScaled, compilation: Compilation, guard: Guard) -> None:
        super().__init__(compilation, guard)
        self.spec = node.spec
        self._codes = compilation.pieces[node.codes]
        self._scales = compilation.pieces[node.scales]
        self._widen = _widen_e4m3 if node.codes.spec.dtype is DType.F8_E4M3 else _widen_e5m2
        self._grid = node.grid

    def _decode(self, start: int, stop: int, out: torch.Tensor, scratch: ThreadScratch) -> None:
        self._widen(self._codes.run(start, stop).view(torch.uint8), out, scratch)
        at = 0
        for box in boxes(start, stop, (1, self._grid.num_rows, self._grid.num_columns)):
            end = at + box.num_elements
            self._scale(box, out[at:end].view(box.shape[1:]), scratch)
            at = end

    def _scale(self, box: Box, values: torch.Tensor, scratch: ThreadScratch) -> None:
        """Multiply rows ``[b0, b1)`` and columns ``[c0, c1)`` in place."""
        grid = self._grid
        first, last = grid.block_row(box.b0), grid.block_row(box.b1 - 1) + 1
        left, right = box.c0 // grid.block[1], -(-box.c1 // grid.block[1])
        stored = self._scales.run(first * grid.width, last * grid.width).view(-1, grid.width)[:, left:right]
        scales = scratch.like(stored, torch.float32).copy_(stored)
        if grid.block[0] > 1:
            index = _block_rows(grid, box.b0, box.b1, values.device).sub_(first)
            by_row = scratch.take(len(index) * (right - left), torch.float32).view(len(index), -1)
            scales = torch.index_select(scales, 0, index, out=by_row)
        for part in parts(box.c0, box.c1, grid.block[1]):
            found = values[:, part.start - box.c0 : part.stop - box.c0]
            factor = scales[:, part.cell - left : part.cell - left + part.num_cells]
            found.view(len(found), part.num_cells, -1).mul_(factor.unsqueeze(2))


@node_of(Mxfp4)
class Mxfp4Node(_Decoder):
    """4-bit floats in groups, transposed."""

    def __init__(self, node: Mxfp4, compilation: Compilation, guard: Guard) -> None:
        super().__init__(compilation, guard)
        self.spec = node.spec
        self._blocks = compilation.pieces[node.blocks]
        self._scales = compilation.pieces[node.scales]
        num_matrices, num_rows, num_columns = node.spec.shape
        self._shape = (num_matrices, num_rows, num_columns)

    def _decode(self, start: int, stop: int, out: torch.Tensor, scratch: ThreadScratch) -> None:
        at = 0
        for box in boxes(start, stop, self._shape):
            end = at + box.num_elements
            mark = scratch.mark()
            self._box(box, out[at:end].view(box.shape), scratch)
            scratch.release(mark)
            at = end

    def _box(self, box: Box, out: torch.Tensor, scratch: ThreadScratch) -> None:
        """Rows ``[b0, b1)`` and columns ``[c0, c1)`` of some matrices. Two rows share their bytes."""
        first, last = box.b0 // 2, -(-box.b1 // 2)
        packed = self._transposed(self._blocks, 2, box, first, last).view(torch.int8)
        numbers = _widen_fp4(scratch.like(packed, torch.int16).copy_(packed), scratch)
        numbers = numbers[:, box.b0 - 2 * first :][:, : box.b1 - box.b0]
        first, last = box.b0 // _GROUP, -(-box.b1 // _GROUP)
        codes = self._transposed(self._scales, _GROUP, box, first, last)
        index = scratch.like(codes, torch.int32).copy_(codes)
        scales = scratch.like(index, torch.float32)
        torch.index_select(_e8m0_on(index.device), 0, index.view(-1), out=scales.view(-1))
        for part in parts(box.b0, box.b1, _GROUP):
            rows = slice(part.start - box.b0, part.stop - box.b0)
            shape = (len(out), part.num_cells, -1, box.c1 - box.c0)
            factor = scales[:, part.cell - first :][:, : part.num_cells].unsqueeze(2)
            torch.mul(numbers[:, rows].view(shape), factor, out=out[:, rows].view(shape))

    def _transposed(self, piece: Loaded, rows_per_byte: int, box: Box, first: int, last: int) -> torch.Tensor:
        """Bytes ``[first, last)`` of the columns and matrices of a box, as they would be in the result (a view)."""
        _, num_rows, num_columns = self._shape
        width = num_rows // rows_per_byte
        stored = piece.run(box.a0 * num_columns * width, box.a1 * num_columns * width)
        return stored.view(-1, num_columns, width)[:, box.c0 : box.c1, first:last].transpose(1, 2)


class Box(NamedTuple):
    """A cuboid of a three-dimensional tensor whose elements form one run."""

    a0: int
    a1: int
    b0: int
    b1: int
    c0: int
    c1: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Its extents."""
        return (self.a1 - self.a0, self.b1 - self.b0, self.c1 - self.c0)

    @property
    def num_elements(self) -> int:
        """Their product."""
        a, b, c = self.shape
        return a * b * c


def boxes(start: int, stop: int, shape: tuple[int, int, int]) -> Iterator[Box]:
    """A run of a row-major tensor as cuboids, in order.

    At most five: the rest of a row, the rest of a matrix, whole matrices, whole rows, the beginning of a row.
    """
    _, num_rows, num_columns = shape
    matrix = num_rows * num_columns
    while start < stop:
        a, within = divmod(start, matrix)
        b, c = divmod(within, num_columns)
        left = stop - start
        if c or left < num_columns:
            box = Box(a, a + 1, b, b + 1, c, min(num_columns, c + left))
        elif b or left < matrix:
            box = Box(a, a + 1, b, min(num_rows, b + left // num_columns), 0, num_columns)
        else:
            box = Box(a, a + left // matrix, 0, num_rows, 0, num_columns)
        yield box
        start += box.num_elements


class Part(NamedTuple):
    """A part of a line of cells: some of one cell, or several whole ones."""

    start: int
    stop: int
    cell: int
    num_cells: int


def parts(start: int, stop: int, size: int) -> Iterator[Part]:
    """``[start, stop)`` of a line cut into cells of ``size``: at most a partial cell, whole ones, a partial one."""
    while start < stop:
        cell, within = divmod(start, size)
        num_cells = 1 if within or stop - start < size else (stop - start) // size
        end = min(stop, (cell + num_cells) * size)
        yield Part(start, end, cell, num_cells)
        start = end


def _block_rows(grid: BlockGrid, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """`BlockGrid.block_row` of rows ``[start, stop)``, int64."""
    rows = torch.arange(start, stop, device=device)
    matrices = rows.div(grid.matrix_rows, rounding_mode="floor")
    within = rows.remainder_(grid.matrix_rows).div_(grid.block[0], rounding_mode="floor")
    return within.add_(matrices, alpha=-(-grid.matrix_rows // grid.block[0]))


def _widen_e4m3(codes: torch.Tensor, out: torch.Tensor, scratch: ThreadScratch) -> None:
    """S.EEEE.MMM with a bias of 7 is a float16 of the same bits, 2^8 times too small; all ones are a NaN."""
    mark = scratch.mark()
    bits = scratch.take(codes.numel(), torch.int16).copy_(codes.view(torch.int8))
    bits.bitwise_left_shift_(7).bitwise_and_(-0x4001)  # the sign was copied to all the bits above: one of them is kept
    out.copy_(bits.view(torch.float16)).mul_(256.0)
    magnitudes = torch.bitwise_and(codes, 0x7F, out=scratch.take(codes.numel(), torch.uint8))
    # A look first saves the CPU a pass; elsewhere it would be to wait for the device.
    if codes.numel() and (codes.device.type != "cpu" or int(magnitudes.max()) == 0x7F):
        out.masked_fill_(magnitudes.eq(0x7F), torch.nan)
    scratch.release(mark)


def _widen_e5m2(codes: torch.Tensor, out: torch.Tensor, scratch: ThreadScratch) -> None:
    """S.EEEEE.MM is the upper byte of a float16, infinities and NaNs included."""
    mark = scratch.mark()
    bits = scratch.take(codes.numel(), torch.int16).copy_(codes)
    out.copy_(bits.bitwise_left_shift_(8).view(torch.float16))
    scratch.release(mark)


def _widen_fp4(packed: torch.Tensor, scratch: ThreadScratch) -> torch.Tensor:
    """Bytes of two FP4 codes -> their values, each byte's pair one below the other.

    S.EE.M with a bias of 1 is a float16 of the same bits, 2^14 times too small.

    Args:
        packed: int16 ``[a, b, c]``, sign-extended.
        scratch: to take from.

    Returns:
        float32 ``[a, 2 b, c]``.
    """
    num_matrices, num_bytes, num_columns = packed.shape
    pairs = scratch.take(2 * packed.numel(), torch.float32).view(num_matrices, num_bytes, 2, num_columns)
    bits = scratch.like(packed)
    torch.bitwise_left_shift(packed, 12, out=bits).bitwise_right_shift_(3).bitwise_and_(-0x7200)
    pairs[:, :, 0].copy_(bits.view(torch.float16))
    torch.bitwise_left_shift(packed, 5, out=bits).bitwise_and_(-0x7200)
    pairs[:, :, 1].copy_(bits.view(torch.float16))
    return pairs.mul_(16384.0).view(num_matrices, 2 * num_bytes, num_columns)


@dataclass(frozen=True, slots=True)
class NonFinite:
    """The first NaN or infinity of several: its flat index, how many there are, and what it is."""

    index: int
    count: int
    value: str


def first_non_finite(data: torch.Tensor, codes: frozenset[int] | None) -> NonFinite | None:
    """Look for what is no finite number in what was read.

    Args:
        data: 1-D, of a load's own dtype.
        codes: the bytes that stand for a NaN or an infinity; None if ``data`` holds numbers.

    Returns:
        None if there is nothing.
    """
    if codes is None:
        bad = torch.nonzero(~torch.isfinite(data))
    else:
        data = data.view(torch.uint8)
        bad = torch.nonzero(torch.isin(data, torch.tensor(sorted(codes), dtype=torch.uint8)))
    if not len(bad):
        return None
    index = int(bad[0])
    value = str(float(data[index])) if codes is None else f"code 0x{int(data[index]):02X}, no finite number,"
    return NonFinite(index, len(bad), value)

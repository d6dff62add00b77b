"""Weights stored as codes with scales: what they stand for, in float32."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions.base import Expression, Load, Stored, expression_kind, from_json, to_json
from mergekit_ray.core.tensors import TensorSpec

FP8_NON_FINITE: Final[Mapping[DType, frozenset[int]]] = {
    DType.F8_E4M3: frozenset({0x7F, 0xFF}),
    DType.F8_E5M2: frozenset({*range(0x7C, 0x80), *range(0xFC, 0x100)}),
}
"""Codes of 8-bit floats that are a NaN or an infinity; E4M3 has no infinities. Source: Micikevicius et al. 2022, "FP8
Formats for Deep Learning", table 1."""

E8M0_NON_FINITE: Final = frozenset({0xFF})
"""The code of a shared exponent that is a NaN. Source: OCP Microscaling Formats (MX) Specification 1.0 (2023)."""

MXFP4_GROUP_BYTES: Final = 16
"""A group of MXFP4 is 32 values of 4 bits that share an exponent (OCP MX 1.0)."""


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """The blocks of a matrix, or of a stack of matrices with blocks of their own.

    Attributes:
        num_rows: rows of all matrices together.
        matrix_rows: rows of one matrix.
        num_columns: columns.
        block: rows and columns of a block; the last ones of a matrix may be cut short.
    """

    num_rows: int
    matrix_rows: int
    num_columns: int
    block: tuple[int, int]

    @property
    def width(self) -> int:
        """Blocks side by side."""
        return -(-self.num_columns // self.block[1])

    def block_row(self, row: int) -> int:
        """The row of blocks that contains a row, counted through all matrices."""
        matrix, within = divmod(row, self.matrix_rows)
        return matrix * -(-self.matrix_rows // self.block[0]) + within // self.block[0]


@expression_kind("block_scaled")
@dataclass(frozen=True, slots=True)
class BlockScaled(Expression):
    """8-bit floats, each times the scale of its block, in float32: ``x[i, j] = codes[i, j] * scales[i // r, j // c]``.

    A block is a rectangle of a matrix (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", 3.3.2), a row or a column of
    it, or the whole tensor. The product is rounded to float32, if it has to be.

    Attributes:
        codes: F8_E4M3 or F8_E5M2, of any shape.
        scales: F32, BF16 or F16, one element per block, in the row-major order of the blocks. Its own shape does not
            matter: scales of rows may be stored as ``[out]`` or ``[out, 1]``.
        block: extent of a block in each dimension of ``codes``: 1 in all but the last two, or else a single block
            takes the whole tensor.
    """

    codes: Load
    scales: Load
    block: tuple[int, ...]

    @property
    def spec(self) -> TensorSpec:
        """Name and shape of the codes, in float32."""
        return TensorSpec(self.codes.spec.name, DType.F32, self.codes.spec.shape)

    @property
    def grid(self) -> BlockGrid:
        """The blocks as rows and columns of them.

        Raises:
            ValueError: blocks that extend over several matrices but not over the whole tensor.
        """
        shape, block = self.codes.spec.shape, self.block
        if len(shape) != len(block) or not all(size > 0 for size in block):
            raise ValueError(f"blocks of {list(block)} do not divide a tensor of {list(shape)}")
        num_elements = math.prod(shape)
        if all(size >= whole for size, whole in zip(block, shape, strict=True)):
            return BlockGrid(1, 1, num_elements, (1, max(1, num_elements)))
        if len(shape) == 1:
            return BlockGrid(1, 1, num_elements, (1, block[0]))
        if any(size != 1 for size in block[:-2]):
            raise ValueError(f"blocks of {list(block)} extend over several matrices of a tensor of {list(shape)}")
        return BlockGrid(math.prod(shape[:-1]), shape[-2], shape[-1], (block[-2], block[-1]))

    def children(self) -> tuple[Expression, ...]:
        """Codes and scales."""
        return (self.codes, self.scales)

    def needs(self, start: int, stop: int) -> Iterator[tuple[Stored, int, int]]:
        """The run of the codes, and the rows of scales it touches."""
        yield self.codes, start, stop
        if start < stop:
            grid = self.grid
            first, last = (grid.block_row(i // grid.num_columns) for i in (start, stop - 1))
            yield self.scales, first * grid.width, (last + 1) * grid.width

    def to_data(self) -> list[Any]:
        """``[codes, scales, block]``."""
        return [to_json(self.codes), to_json(self.scales), list(self.block)]

    @classmethod
    def from_data(cls, data: list[Any]) -> Self:
        """Inverse of `to_data`."""
        codes, scales, block = data
        return cls(_load(codes), _load(scales), tuple(block))


@expression_kind("mxfp4")
@dataclass(frozen=True, slots=True)
class Mxfp4(Expression):
    """4-bit floats in groups of 32 that share a power of two, transposed, in float32 (exact).

    ``x[e, 32 g + 2 b + k, n] = fp4(nibble k of blocks[e, n, g, b]) * 2^(scales[e, n, g] - 127)``, the low nibble
    first; ``fp4`` is E2M1: ±{0, 0.5, 1, 1.5, 2, 3, 4, 6}. A scale of 255 makes its group NaN.

    The formats are those of the OCP Microscaling Formats (MX) Specification 1.0 (2023). The layout is gpt-oss's:
    matrices of experts are stored ``[out, in]``, and Hugging Face's model holds them ``[in, out]``.

    Attributes:
        blocks: U8 ``[E, N, G, 16]``.
        scales: U8 ``[E, N, G]``.
        name: of the result, whose shape is ``[E, 32 G, N]``.
    """

    blocks: Load
    scales: Load
    name: str

    @property
    def spec(self) -> TensorSpec:
        """``[E, 32 G, N]`` in float32."""
        num_matrices, num_columns, num_groups, group_bytes = self.blocks.spec.shape
        return TensorSpec(self.name, DType.F32, (num_matrices, num_groups * group_bytes * 2, num_columns))

    def children(self) -> tuple[Expression, ...]:
        """Blocks and scales."""
        return (self.blocks, self.scales)

    def needs(self, start: int, stop: int) -> Iterator[tuple[Stored, int, int]]:
        """All of the matrices that the run touches: a row of the result has bytes of all rows of one of them."""
        if start < stop:
            matrix = math.prod(self.spec.shape[1:])
            first, last = start // matrix, -(-stop // matrix)
            for load in self.children():
                assert isinstance(load, Load)
                num_elements = math.prod(load.spec.shape[1:])
                yield load, first * num_elements, last * num_elements

    @property
    def unit(self) -> int:
        """One matrix."""
        return max(1, math.prod(self.spec.shape[1:]))

    def to_data(self) -> list[Any]:
        """``[blocks, scales, name]``."""
        return [to_json(self.blocks), to_json(self.scales), self.name]

    @classmethod
    def from_data(cls, data: list[Any]) -> Self:
        """Inverse of `to_data`."""
        blocks, scales, name = data
        return cls(_load(blocks), _load(scales), name)


def non_finite_codes(expression: Expression) -> dict[Stored, frozenset[int]]:
    """Of every leaf in a tree that is read as codes, the bytes that are a NaN or an infinity."""
    found: dict[Stored, frozenset[int]] = {}
    stack = [expression]
    while stack:
        node = stack.pop()
        if isinstance(node, BlockScaled):
            found[node.codes] = FP8_NON_FINITE[node.codes.spec.dtype]
        elif isinstance(node, Mxfp4):
            found[node.blocks] = frozenset()
            found[node.scales] = E8M0_NON_FINITE
        else:
            stack.extend(node.children())
    return found


def _load(data: list[Any]) -> Load:
    found = from_json(data)
    if not isinstance(found, Load):
        raise ValueError("codes and scales are read from files")
    return found

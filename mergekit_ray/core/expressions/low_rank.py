"""Low-rank changes of a matrix: a LoRA, never materialised as a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

from mergekit_ray.core.declaration import Access
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions.base import Expression, Stored, expression_kind, from_json, most, to_json
from mergekit_ray.core.expressions.runs import Runs
from mergekit_ray.core.tensors import TensorSpec

_FLOAT64_BYTES = 8


@expression_kind("low_rank")
@dataclass(frozen=True, slots=True)
class LowRank(Expression):
    """``x + scale · (b @ a)``, or ``x + scale · (b @ a)ᵀ`` if ``transposed``.

    A LoRA (Hu et al. 2021, https://arxiv.org/abs/2106.09685) applied on the fly. With a ``magnitude`` it is a DoRA (Liu
    et al. 2024, https://arxiv.org/abs/2402.09353): each of the layer's outputs, a row of the result or a column if
    ``transposed``, is scaled to that norm: ``m_i · v_i / |v_i|``. An output that is zero stays zero.

    Attributes:
        x: the base's tensor, ``[rows, columns]``.
        a: ``[rank, columns]``; if ``transposed``, ``[rank, rows]``. There it may have more columns than ``x`` has rows:
            the first ones count.
        b: ``[rows, rank]``; if ``transposed``, ``[columns, rank]``.
        scale: of the product.
        transposed: the matrix is stored as inputs by outputs: GPT-2's ``Conv1D``, embeddings.
        dtype: of the result, to which it is rounded once.
        magnitude: norm of each output of the layer, 1-D; None for a plain LoRA.
        selected: if ``transposed``, the column of ``a`` for each row of ``x``, as runs of part 0, where these are an
            embedding's rows in the order of another vocabulary; None if they are in that of ``a``.
    """

    x: Expression
    a: Expression
    b: Expression
    scale: float
    transposed: bool = False
    dtype: DType = DType.F32
    magnitude: Expression | None = None
    selected: Runs | None = None

    def __post_init__(self) -> None:
        """Check the columns that are selected.

        Raises:
            ValueError: they are not as many as ``x`` has rows, or not there; or they would not be used.
        """
        if self.selected is None:
            return
        if not self.transposed or self.magnitude is not None or (self.selected.table[:, 0] != 0).any():
            raise ValueError("columns of the first factor are selected of transposed factors that have no magnitude")
        columns = TensorSpec(self.a.spec.name, self.a.spec.dtype, self.a.spec.shape[1:])
        self.selected.row_elements(replace(columns, shape=self.x.spec.shape[:1]), [columns])

    @property
    def spec(self) -> TensorSpec:
        """Spec of ``x`` with the result's dtype."""
        inner = self.x.spec
        return TensorSpec(inner.name, self.dtype, inner.shape)

    def children(self) -> tuple[Expression, ...]:
        """``x``, ``a``, ``b``, and the magnitude if there is one."""
        return (self.x, self.a, self.b) if self.magnitude is None else (self.x, self.a, self.b, self.magnitude)

    def needs(self, start: int, stop: int) -> Iterator[tuple[Stored, int, int]]:
        """The run of ``x``, widened to what its norms need; the rows of ``b`` for it, and all of ``a``.

        If ``transposed``, all of both factors.
        """
        rows, columns = self.x.spec.shape
        first, last = start // max(1, columns), -(-stop // max(1, columns))
        if self.transposed:
            first, last = 0, rows
        whole_rows = self.magnitude is not None
        yield from self.x.needs(first * columns if whole_rows else start, last * columns if whole_rows else stop)
        yield from self.a.needs(0, self.a.spec.num_elements)
        for factor in self.children()[2:]:
            if self.transposed:
                yield from factor.needs(0, factor.spec.num_elements)
            else:
                per_row = factor.spec.num_elements // max(1, rows)
                yield from factor.needs(first * per_row, last * per_row)

    @property
    def access(self) -> Access:
        """Norms of columns are statistics of the whole; all else is element by element."""
        own = Access.REDUCE if self.magnitude is not None and self.transposed else Access.ELEMENTWISE
        return most([own, *(child.access for child in self.children())])

    @property
    def scratch_bytes(self) -> int:
        """The factors in float64, but for the one that has a row for each of ``x``."""
        below = sum(child.scratch_bytes for child in self.children())
        held = self.a.spec.num_elements + (2 * self.b.spec.num_elements if self.transposed else 0)
        if self.selected is not None:
            held += self.a.spec.shape[0] * self.x.spec.shape[0]
        return below + held * _FLOAT64_BYTES

    @property
    def chunk_bytes(self) -> int:
        """The sum, and the rows of the factor that has one for each of ``x``, both in float64."""
        rows, columns = self.x.spec.shape
        per_element = 0 if self.transposed else -(-self.b.spec.num_elements // max(1, rows * columns))
        return super(LowRank, self).chunk_bytes + per_element * _FLOAT64_BYTES

    def to_data(self) -> list[Any]:
        """The attributes in their order."""
        return [
            to_json(self.x),
            to_json(self.a),
            to_json(self.b),
            self.scale,
            self.transposed,
            self.dtype.value,
            None if self.magnitude is None else to_json(self.magnitude),
            *([] if self.selected is None else [self.selected.to_json()]),
        ]

    @classmethod
    def from_data(cls, data: list[Any]) -> Self:
        """Inverse of `to_data`."""
        x, a, b, scale, transposed, dtype, magnitude, *selected = data
        return cls(
            x=from_json(x),
            a=from_json(a),
            b=from_json(b),
            scale=scale,
            transposed=transposed,
            dtype=DType(dtype),
            magnitude=None if magnitude is None else from_json(magnitude),
            selected=Runs.from_json(*selected) if selected else None,
        )

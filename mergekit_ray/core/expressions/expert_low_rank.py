"""Low-rank changes of experts: a LoRA on parameters that hold all experts of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions.base import Expression, Stored, expression_kind, from_json, to_json
from mergekit_ray.core.tensors import TensorSpec

_FLOAT64_BYTES = 8


@expression_kind("expert_low_rank")
@dataclass(frozen=True, slots=True)
class ExpertLowRank(Expression):
    """``x_e + scale · (b_e @ a_e)`` for each expert ``e`` that ``x`` holds; the product's transpose if ``transposed``.

    The layout of the factors is that of PEFT's adapters of parameters (``target_parameters``).

    Attributes:
        x: the base's tensor: ``[experts, outputs, inputs]``, or ``[outputs, inputs]`` of one expert; the last two
            exchanged if ``transposed``.
        a: ``[experts · rank, inputs]``: of the experts that ``x`` holds, one after the other.
        b: ``[outputs, rank · num_experts]``: of all experts of the layer; column ``k · num_experts + e`` is the
            ``k``-th of expert ``e``.
        scale: of the product.
        num_experts: of the layer.
        first_expert: the first that ``x`` holds.
        transposed: matrices are stored as inputs by outputs.
        dtype: of the result, to which it is rounded once.
    """

    x: Expression
    a: Expression
    b: Expression
    scale: float
    num_experts: int
    first_expert: int = 0
    transposed: bool = False
    dtype: DType = DType.F32

    @property
    def spec(self) -> TensorSpec:
        """Spec of ``x`` with the result's dtype."""
        inner = self.x.spec
        return TensorSpec(inner.name, self.dtype, inner.shape)

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of one expert's part of ``x``."""
        rows, columns = self.x.spec.shape[-2:]
        return rows, columns

    def children(self) -> tuple[Expression, ...]:
        """``x``, ``a`` and ``b``."""
        return self.x, self.a, self.b

    def needs(self, start: int, stop: int) -> Iterator[tuple[Stored, int, int]]:
        """The run of ``x``, and both factors whole."""
        yield from self.x.needs(start, stop)
        for factor in (self.a, self.b):
            yield from factor.needs(0, factor.spec.num_elements)

    @property
    def scratch_bytes(self) -> int:
        """The factors in float64, and what of ``b`` belongs to the experts once more, in their order."""
        below = sum(child.scratch_bytes for child in self.children())
        return below + (self.a.spec.num_elements + 2 * self.b.spec.num_elements) * _FLOAT64_BYTES

    def to_data(self) -> list[Any]:
        """The attributes in their order."""
        factors = [to_json(self.x), to_json(self.a), to_json(self.b)]
        return [*factors, self.scale, self.num_experts, self.first_expert, self.transposed, self.dtype.value]

    @classmethod
    def from_data(cls, data: list[Any]) -> Self:
        """Inverse of `to_data`."""
        x, a, b, scale, num_experts, first_expert, transposed, dtype = data
        return cls(from_json(x), from_json(a), from_json(b), scale, num_experts, first_expert, transposed, DType(dtype))

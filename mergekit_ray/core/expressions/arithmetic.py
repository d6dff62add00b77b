"""Rounding, scaling, merging."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from mergekit_ray.core.declaration import Access
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions.base import (
    Expression,
    Scalar,
    expression_kind,
    from_json,
    most,
    spec_from_json,
    spec_to_json,
    to_json,
)
from mergekit_ray.core.registry import METHODS
from mergekit_ray.core.tensors import TensorSpec

METHOD_RUNS = 8
"""Runs in compute dtype that a method takes beside its inputs, about."""


@expression_kind("cast")
@dataclass(frozen=True, slots=True)
class Cast(Expression):
    """``x`` rounded once to ``dtype`` (round to nearest, ties to even)."""

    x: Expression
    dtype: DType

    @property
    def spec(self) -> TensorSpec:
        """Spec of ``x`` with the new dtype."""
        inner = self.x.spec
        return TensorSpec(inner.name, self.dtype, inner.shape)

    def children(self) -> tuple[Expression, ...]:
        """``x``."""
        return (self.x,)

    def to_data(self) -> list[Any]:
        """``[x, dtype]``."""
        return [to_json(self.x), self.dtype.value]

    @classmethod
    def from_data(cls, data: list[Any]) -> Self:
        """Inverse of `to_data`."""
        x, dtype = data
        return cls(from_json(x), DType(dtype))


@expression_kind("scale")
@dataclass(frozen=True, slots=True)
class Scale(Expression):
    """``x * factor``, computed in ``compute_dtype`` and rounded once to ``dtype``."""

    x: Expression
    factor: float
    dtype: DType
    compute_dtype: DType = DType.F32

    @property
    def spec(self) -> TensorSpec:
        """Spec of ``x`` with the output dtype."""
        inner = self.x.spec
        return TensorSpec(inner.name, self.dtype, inner.shape)

    def children(self) -> tuple[Expression, ...]:
        """``x``."""
        return (self.x,)

    def to_data(self) -> list[Any]:
        """``[x, factor, dtype, compute_dtype]``."""
        return [to_json(self.x), self.factor, self.dtype.value, self.compute_dtype.value]

    @classmethod
    def from_data(cls, data: list[Any]) -> Self:
        """Inverse of `to_data`."""
        x, factor, dtype, compute_dtype = data
        return cls(from_json(x), factor, DType(dtype), DType(compute_dtype))


@expression_kind("merge")
@dataclass(frozen=True, slots=True)
class Merge(Expression):
    """A merge method applied to tensors of one shape.

    Attributes:
        method: name in the method registry.
        spec: output name, dtype, shape.
        inputs: one expression per model, in the recipe's order; the base is not among them.
        base: the base model's tensor, if the method has one.
        parameters: the method's global parameters at this tensor (resolved scalars).
        input_parameters: per-model parameters, one mapping per input.
        keys: one string per input that seeds its randomness: a pure function of seed, output name and model.
        compute_dtype: dtype of all arithmetic.
    """

    method: str
    spec: TensorSpec
    inputs: tuple[Expression, ...]
    base: Expression | None
    parameters: Mapping[str, Scalar]
    input_parameters: tuple[Mapping[str, Scalar], ...]
    keys: tuple[str, ...]
    compute_dtype: DType = DType.F32

    def children(self) -> tuple[Expression, ...]:
        """The inputs, and the base last."""
        return self.inputs if self.base is None else (*self.inputs, self.base)

    @property
    def access(self) -> Access:
        """The most that the method or any input needs."""
        own = METHODS.get(self.method).effective_access(dict(self.parameters))
        return most([own, *(child.access for child in self.children())])

    @property
    def held(self) -> tuple[Expression, ...]:
        """Merged inputs, each once, that are kept since the method looks at each element several times."""
        access = METHODS.get(self.method).effective_access(dict(self.parameters))
        if access is not Access.REDUCE:
            return ()
        found: list[Expression] = []
        for child in filter(_is_merged, self.children()):
            if child not in found:
                found.append(child)
        return tuple(found)

    @property
    def scratch_bytes(self) -> int:
        """What a method holds of the whole tensor: its statistics; all of it in compute dtype, if it needs that."""
        below = sum(child.scratch_bytes for child in self.children()) + sum(x.spec.num_bytes for x in self.held)
        method = METHODS.get(self.method)
        access = method.effective_access(dict(self.parameters))
        if access is Access.ELEMENTWISE:
            return below
        itemsize = self.compute_dtype.itemsize
        below += method.working_bytes(self.spec.shape, len(self.inputs), itemsize)
        if access is Access.REDUCE:
            return below
        return below + (len(self.children()) + 1) * self.spec.num_elements * itemsize

    @property
    def chunk_bytes(self) -> int:
        """Inputs, the base, and what the method or an input takes beside them."""
        itemsize = self.compute_dtype.itemsize
        return len(self.children()) * itemsize + max(super(Merge, self).chunk_bytes, METHOD_RUNS * itemsize)

    @property
    def propagates_non_finite(self) -> bool:
        """Whether the method and all that is below do."""
        return METHODS.get(self.method).propagates_non_finite and all(
            child.propagates_non_finite for child in self.children()
        )

    def to_data(self) -> list[Any]:
        """The attributes in their order."""
        return [
            self.method,
            spec_to_json(self.spec),
            [to_json(x) for x in self.inputs],
            None if self.base is None else to_json(self.base),
            dict(self.parameters),
            [dict(p) for p in self.input_parameters],
            list(self.keys),
            self.compute_dtype.value,
        ]

    @classmethod
    def from_data(cls, data: list[Any]) -> Self:
        """Inverse of `to_data`."""
        method, spec, inputs, base, parameters, input_parameters, keys, compute_dtype = data
        return cls(
            method=method,
            spec=spec_from_json(spec),
            inputs=tuple(from_json(x) for x in inputs),
            base=None if base is None else from_json(base),
            parameters=parameters,
            input_parameters=tuple(input_parameters),
            keys=tuple(keys),
            compute_dtype=DType(compute_dtype),
        )


def _is_merged(x: Expression) -> bool:
    return isinstance(x, Merge) or any(map(_is_merged, x.children()))

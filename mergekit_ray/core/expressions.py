"""The tree that computes one output tensor.

A plan holds one expression per output tensor. Nodes are plain frozen data: they name methods and files, they never hold
weights. Every node knows the spec of its result; `loads` gives all that must be read.

    Load(model, spec, location)          bytes as they are
    Cast(x, dtype)                       one rounding
    Scale(x, factor, ...)                x * factor
    Merge(method, spec, inputs, ...)     a merge method over several tensors
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.tensors import Location, TensorSpec

Scalar: TypeAlias = float | int | bool | str | None


@dataclass(frozen=True, slots=True)
class Load:
    """The tensor as it lies in a file.

    Attributes:
        model: key of the model in ``Plan.inputs``.
        spec: dtype and shape of what is read. The shape may be a leading part (fewer rows) of what the file holds;
            ``location`` is narrowed accordingly.
        location: file and byte range.
    """

    model: str
    spec: TensorSpec
    location: Location


@dataclass(frozen=True, slots=True)
class Cast:
    """``x`` rounded once to ``dtype`` (round to nearest, ties to even)."""

    x: Expression
    dtype: DType

    @property
    def spec(self) -> TensorSpec:
        """Spec of ``x`` with the new dtype."""
        inner = self.x.spec
        return TensorSpec(inner.name, self.dtype, inner.shape)


@dataclass(frozen=True, slots=True)
class Scale:
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


@dataclass(frozen=True, slots=True)
class Merge:
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


Expression: TypeAlias = Load | Cast | Scale | Merge


def children(expression: Expression) -> tuple[Expression, ...]:
    """The expressions directly below."""
    match expression:
        case Load():
            return ()
        case Cast() | Scale():
            return (expression.x,)
        case Merge():
            return expression.inputs if expression.base is None else (*expression.inputs, expression.base)


def loads(expression: Expression) -> Iterator[Load]:
    """Every distinct `Load` of the tree, in order of first appearance."""
    seen: set[tuple[str, Location]] = set()
    stack = [expression]
    while stack:
        node = stack.pop()
        if isinstance(node, Load):
            if (node.model, node.location) not in seen:
                seen.add((node.model, node.location))
                yield node
        else:
            stack.extend(reversed(children(node)))


def is_copy(expression: Expression) -> bool:
    """Whether the result is the input's bytes, unchanged."""
    return isinstance(expression, Load)


def to_json(expression: Expression) -> list[Any]:
    """The tree as nested JSON lists, tagged by kind."""
    match expression:
        case Load(model, spec, location):
            return ["load", model, spec_to_json(spec), [location.file, location.start, location.end]]
        case Cast(x, dtype):
            return ["cast", to_json(x), dtype.value]
        case Scale(x, factor, dtype, compute_dtype):
            return ["scale", to_json(x), factor, dtype.value, compute_dtype.value]
        case Merge():
            return [
                "merge",
                expression.method,
                spec_to_json(expression.spec),
                [to_json(x) for x in expression.inputs],
                None if expression.base is None else to_json(expression.base),
                dict(expression.parameters),
                [dict(p) for p in expression.input_parameters],
                list(expression.keys),
                expression.compute_dtype.value,
            ]


def from_json(data: list[Any]) -> Expression:
    """Inverse of `to_json`.

    Raises:
        ValueError: an unknown kind of node.
    """
    match data:
        case ["load", model, spec, [file, start, end]]:
            return Load(model, spec_from_json(spec), Location(file, start, end))
        case ["cast", x, dtype]:
            return Cast(from_json(x), DType(dtype))
        case ["scale", x, factor, dtype, compute_dtype]:
            return Scale(from_json(x), factor, DType(dtype), DType(compute_dtype))
        case ["merge", method, spec, inputs, base, parameters, input_parameters, keys, compute_dtype]:
            return Merge(
                method=method,
                spec=spec_from_json(spec),
                inputs=tuple(from_json(x) for x in inputs),
                base=None if base is None else from_json(base),
                parameters=parameters,
                input_parameters=tuple(input_parameters),
                keys=tuple(keys),
                compute_dtype=DType(compute_dtype),
            )
    raise ValueError(f"not an expression: {data[:1]!r}")


def spec_to_json(spec: TensorSpec) -> list[Any]:
    """``[name, dtype, shape]``."""
    return [spec.name, spec.dtype.value, list(spec.shape)]


def spec_from_json(data: list[Any]) -> TensorSpec:
    """Inverse of `spec_to_json`."""
    name, dtype, shape = data
    return TensorSpec(name, DType(dtype), tuple(shape))

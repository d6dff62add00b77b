"""The leaves: bytes of an input file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

from mergekit_ray.core.expressions.base import (
    Expression,
    expression_kind,
    location_from_json,
    location_to_json,
    spec_from_json,
    spec_to_json,
)
from mergekit_ray.core.tensors import Location, TensorSpec


@expression_kind("load")
@dataclass(frozen=True, slots=True)
class Load(Expression):
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

    def children(self) -> tuple[Expression, ...]:
        """None: it is a leaf."""
        return ()

    def needs(self, start: int, stop: int) -> Iterator[tuple[Load, int, int]]:
        """The run itself."""
        yield self, start, stop

    def to_data(self) -> list[Any]:
        """``[model, spec, location]``."""
        return [self.model, spec_to_json(self.spec), location_to_json(self.location)]

    @classmethod
    def from_data(cls, data: list[Any]) -> Self:
        """Inverse of `to_data`."""
        model, spec, location = data
        return cls(model, spec_from_json(spec), location_from_json(location))


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
            stack.extend(reversed(node.children()))


def is_copy(expression: Expression) -> bool:
    """Whether the result is the input's bytes, unchanged."""
    return isinstance(expression, Load)

"""What every kind of expression is, its leaves that are read from files, and what can be asked of a tree."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeAlias, TypeVar

from mergekit_ray.core.declaration import Access
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.tensors import Location, TensorSpec

Scalar: TypeAlias = float | int | bool | str | None

_FLOAT64_BYTES = 8

_ORDER = [Access.ELEMENTWISE, Access.REDUCE, Access.WHOLE]


class Expression(ABC):
    """A node of a tree: plain frozen data. It names methods and files, it never holds weights.

    Attributes:
        kind: tag in JSON.
        reads_all: all of its children is read where all of it is wanted.
        spec: name, dtype and shape of the result.
    """

    __slots__ = ()

    kind: ClassVar[str]
    reads_all: ClassVar[bool] = True

    if TYPE_CHECKING:

        @property
        def spec(self) -> TensorSpec: ...  # noqa: D102 - see the class

    @abstractmethod
    def children(self) -> tuple[Expression, ...]:
        """The expressions directly below."""

    @abstractmethod
    def to_data(self) -> list[Any]:
        """Its attributes as plain JSON data, children by `to_json`."""

    @classmethod
    @abstractmethod
    def from_data(cls, data: list[Any]) -> Self:
        """Inverse of `to_data`.

        Raises:
            ValueError, TypeError: ``data`` is of another form.
        """

    def needs(self, start: int, stop: int) -> Iterator[tuple[Stored, int, int]]:
        """What must be read for elements ``[start, stop)`` of the result: each leaf with its own run of elements.

        By default the same run of every child. A leaf may come more than once.
        """
        for child in self.children():
            yield from child.needs(start, stop)

    @property
    def access(self) -> Access:
        """What must be seen at once: by default the most that any child needs."""
        return most([child.access for child in self.children()])

    @property
    def scratch_bytes(self) -> int:
        """Bytes of temporaries that grow with the tensor."""
        return sum(child.scratch_bytes for child in self.children())

    @property
    def chunk_bytes(self) -> int:
        """Bytes of temporaries for each element that is computed at once."""
        return max((child.chunk_bytes + _FLOAT64_BYTES for child in self.children()), default=0)

    @property
    def unit(self) -> int:
        """Elements that are best computed together, since what they are read from cannot be cut; 1 if any run will do.

        Windows are whole numbers of units.
        """
        return math.lcm(*(child.unit for child in self.children()))

    @property
    def propagates_non_finite(self) -> bool:
        """Whether a NaN or infinity in any input always shows in the result."""
        return all(child.propagates_non_finite for child in self.children())


def most(accesses: Sequence[Access]) -> Access:
    """The most demanding of several, elementwise if there are none."""
    return max(accesses, key=_ORDER.index, default=Access.ELEMENTWISE)


KINDS: dict[str, type[Expression]] = {}
"""Kinds of expression by their tag."""

E = TypeVar("E", bound=type[Expression])


def expression_kind(tag: str) -> Callable[[E], E]:
    """Decorator: a kind of expression with its tag in JSON."""

    def enter(cls: E) -> E:
        cls.kind = tag
        KINDS[tag] = cls
        return cls

    return enter


def to_json(expression: Expression) -> list[Any]:
    """The tree as nested JSON lists, tagged by kind."""
    return [expression.kind, *expression.to_data()]


def from_json(data: list[Any]) -> Expression:
    """Inverse of `to_json`.

    Raises:
        ValueError: an unknown kind of node, or attributes that do not fit its kind.
    """
    match data:
        case [str(tag), *rest] if tag in KINDS:
            try:
                return KINDS[tag].from_data(rest)
            except (TypeError, ValueError) as error:
                raise ValueError(f"not an expression: {data[:1]!r}: {error}") from error
    raise ValueError(f"not an expression: {data[:1]!r}")


def spec_to_json(spec: TensorSpec) -> list[Any]:
    """``[name, dtype, shape]``."""
    return [spec.name, spec.dtype.value, list(spec.shape)]


def spec_from_json(data: list[Any]) -> TensorSpec:
    """Inverse of `spec_to_json`."""
    name, dtype, shape = data
    return TensorSpec(name, DType(dtype), tuple(shape))


def location_to_json(location: Location) -> list[Any]:
    """``[file, start, end]``."""
    return [location.file, location.start, location.end]


def location_from_json(data: list[Any]) -> Location:
    """Inverse of `location_to_json`."""
    file, start, end = data
    return Location(file, start, end)


class Stored(Expression):
    """A leaf that is read: bytes of files, in the dtype of its spec, which no arithmetic has changed."""

    __slots__ = ()

    @property
    @abstractmethod
    def read_from(self) -> tuple[Load, ...]:
        """The tensors of files that it is read from."""

    @abstractmethod
    def read_bytes(self, start: int, stop: int) -> int:
        """Bytes of files that elements ``[start, stop)`` are."""

    def held(self, start: int, stop: int) -> tuple[int, int]:
        """The elements that are in memory where ``[start, stop)`` are asked for: those, and what cannot be cut off."""
        return start, stop

    @abstractmethod
    def origin(self, element: int) -> tuple[Load, int]:
        """Which element of which tensor in a file an element is; both by flat index."""

    def children(self) -> tuple[Expression, ...]:
        """None: it is a leaf."""
        return ()

    def needs(self, start: int, stop: int) -> Iterator[tuple[Stored, int, int]]:
        """The run itself."""
        yield self, start, stop


@expression_kind("load")
@dataclass(frozen=True, slots=True)
class Load(Stored):
    """A tensor as stored in a file.

    Attributes:
        model: key of the model in ``Plan.inputs``.
        spec: dtype and shape of what is read. The shape may be a leading part (fewer rows) of what the file holds;
            ``location`` is narrowed accordingly.
        location: file and byte range.
    """

    model: str
    spec: TensorSpec
    location: Location

    def __post_init__(self) -> None:
        """Check that the bytes are those of the shape: compiled loops read as many elements as the spec says.

        Raises:
            ValueError: they are not.
        """
        num_bytes = self.location.end - self.location.start
        if num_bytes != self.spec.num_bytes or self.location.start < 0:
            raise ValueError(
                f"tensor {self.spec.name!r} has {self.spec.num_bytes} bytes, and {num_bytes} at its place in "
                f"{self.location.file}"
            )

    @property
    def read_from(self) -> tuple[Load, ...]:
        """Itself."""
        return (self,)

    def read_bytes(self, start: int, stop: int) -> int:
        """See `Stored.read_bytes`."""
        return (stop - start) * self.spec.dtype.itemsize

    def origin(self, element: int) -> tuple[Load, int]:
        """Its own."""
        return self, element

    def to_data(self) -> list[Any]:
        """``[model, spec, location]``."""
        return [self.model, spec_to_json(self.spec), location_to_json(self.location)]

    @classmethod
    def from_data(cls, data: list[Any]) -> Self:
        """Inverse of `to_data`."""
        model, spec, location = data
        return cls(model, spec_from_json(spec), location_from_json(location))


def stored(expression: Expression) -> Iterator[Stored]:
    """Every distinct leaf of the tree that is read, in order of first appearance."""
    seen: set[object] = set()
    stack = [expression]
    while stack:
        node = stack.pop()
        if isinstance(node, Stored):
            key = (node.model, node.location) if isinstance(node, Load) else node
            if key not in seen:
                seen.add(key)
                yield node
        else:
            stack.extend(reversed(node.children()))


def needed(expression: Expression, start: int, stop: int) -> dict[Stored, tuple[int, int]]:
    """Every leaf that is read for elements ``[start, stop)`` of the result, with the run of its elements."""
    found: dict[Stored, tuple[int, int]] = {}
    for leaf, first, last in expression.needs(start, stop):
        known_first, known_last = found.get(leaf, (first, last))
        found[leaf] = (min(known_first, first), max(known_last, last))
    return found


def read_bytes(expression: Expression) -> int:
    """Bytes of files that all of a tensor is read from."""
    seen: dict[object, int] = {}
    stack = [expression] if expression.spec.num_elements else []
    while stack:
        node = stack.pop()
        if isinstance(node, Load):
            seen[node.model, node.location] = node.location.num_bytes
        elif isinstance(node, Stored):
            seen[node] = node.read_bytes(0, node.spec.num_elements)
        elif node.reads_all:
            stack.extend(node.children())
        else:
            runs = needed(expression, 0, expression.spec.num_elements)
            return sum(leaf.read_bytes(*run) for leaf, run in runs.items())
    return sum(seen.values())


def loads(expression: Expression) -> Iterator[Load]:
    """Every distinct tensor of a file that something of the tree is read from, in order of first appearance."""
    seen: set[tuple[str, Location]] = set()
    for leaf in stored(expression):
        for load in leaf.read_from:
            if (load.model, load.location) not in seen:
                seen.add((load.model, load.location))
                yield load


def substituted(expression: Expression, substitute: Callable[[Expression], Expression | None]) -> Expression:
    """The tree with other nodes in place of some.

    Args:
        expression: the tree.
        substitute: what takes a node's place, of the same spec; None if the node stays.
    """
    other = substitute(expression)
    if other is not None:
        return other
    changes: dict[str, Any] = {}
    for field in fields(expression) if expression.children() else ():  # type: ignore[arg-type] # every kind is a dataclass
        value = getattr(expression, field.name)
        if isinstance(value, Expression):
            changes[field.name] = substituted(value, substitute)
        elif isinstance(value, tuple):
            changes[field.name] = tuple(substituted(x, substitute) if isinstance(x, Expression) else x for x in value)
    return replace(expression, **changes) if changes else expression  # type: ignore[type-var] # as above


def is_copy(expression: Expression) -> bool:
    """Whether the result is bytes of the inputs, unchanged."""
    return isinstance(expression, Stored)

"""What evaluates one kind of expression, and what all of them share.

A node fills any run of its elements into a buffer its parent gives it. It is made once per output tensor from its
expression; how it is cut and on how many threads never changes a number.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, Self, TypeVar

import torch

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Concat, Expression, Gather, Load, Rows, Stored
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.evaluation.pieces import Pieces
from mergekit_ray.evaluation.pool import CHUNK_ELEMENTS, ComputePool
from mergekit_ray.evaluation.rounding import fits, fits_there, is_finite, round_into
from mergekit_ray.evaluation.scratch import TORCH_DTYPES, ThreadScratch, as_tensor


class Node(Protocol):
    """Evaluates one expression.

    Attributes:
        spec: of the expression.
    """

    spec: TensorSpec

    def prepare(self) -> None:
        """Whatever must be known of the whole tensor first; children are prepared here."""
        ...

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Write elements ``[start, stop)`` to ``out``, 1-D.

        Its dtype is that of ``spec``, or a wider one that the caller computes in.
        """
        ...


class Loaded(Protocol):
    """What a `Load` or a `Gather` is filled from.

    Attributes:
        start: flat index of the first element present.
    """

    @property
    def start(self) -> int: ...  # noqa: D102 - see the class

    def run(self, start: int, stop: int) -> torch.Tensor:
        """Elements ``[start, stop)`` of the whole tensor, 1-D in the leaf's own dtype, where the nodes compute.

        Not to be written to.
        """
        ...


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes of one leaf that is read (or a window of it) in memory.

    Attributes:
        data: 1-D tensor of the leaf's own dtype.
        start: flat index of its first element in the whole tensor.
    """

    data: torch.Tensor
    start: int

    def run(self, start: int, stop: int) -> torch.Tensor:
        """Elements ``[start, stop)`` of the whole tensor."""
        return self.data[start - self.start : stop - self.start]

    @classmethod
    def of(cls, pieces: Pieces) -> dict[Stored, Self]:
        """Those of a window, sharing its bytes."""
        return {leaf: cls(as_tensor(data, leaf.spec.dtype), start) for leaf, (data, start) in pieces.items()}


class NonFiniteError(Exception):
    """A NaN or infinity was met; who it belongs to is found out afterwards."""


@dataclass(slots=True)
class Guard:
    """Whether a node looks for NaN and infinities: in what it loads, in what it rounds.

    Attributes:
        inputs, result: where to look.
        all_finite: on a device other than the CPU, a 0-dimensional boolean there: whether all that was looked at so far
            was finite. Asking for it waits for the device, which is done once at the end.
    """

    inputs: bool = False
    result: bool = False
    all_finite: torch.Tensor | None = None

    def check(self, values: torch.Tensor, dtype: torch.dtype | None = None) -> None:
        """Check that values are finite, and stay so when rounded to ``dtype`` if one is given.

        Raises:
            NonFiniteError: they do not. On a device it is noted in ``all_finite`` instead.
        """
        if self.all_finite is not None:
            self.all_finite.logical_and_(fits_there(values, dtype))
        elif not (is_finite(values) if dtype is None else fits(values, dtype)):
            raise NonFiniteError


@dataclass(frozen=True)
class Compilation:
    """What nodes are made with.

    Attributes:
        pieces: the bytes of each leaf that is read.
        pool: threads to compute on, with their scratch; says on which device.
        guard: of all nodes below the root.
    """

    pieces: Mapping[Stored, Loaded]
    pool: ComputePool
    guard: Guard = field(default_factory=Guard)

    def compile(self, expression: Expression, guard: Guard | None = None) -> Node:
        """The node of an expression; ``guard`` is the root's own."""
        kind = type(expression)
        if kind not in NODES:
            importlib.import_module(f"{__package__}.{kind.__module__.rpartition('.')[2]}")
        return NODES[kind](expression, self, guard or self.guard)

    def has_inputs(self, expression: Expression) -> bool:
        """Whether what is read of an expression is there: of parts laid end to end, that of those a window touches."""
        if isinstance(expression, Stored):
            return expression in self.pieces
        children = expression.children()
        if isinstance(expression, Concat | Rows):
            return not children or any(map(self.has_inputs, children))
        return all(map(self.has_inputs, children))


NODES: dict[type[Expression], Callable[[Any, Compilation, Guard], Node]] = {}
"""Classes of nodes by the kind of expression they evaluate."""

N = TypeVar("N", bound=Callable[[Any, Compilation, Guard], Node])


def node_of(kind: type[Expression]) -> Callable[[N], N]:
    """Decorator: the class that evaluates a kind of expression."""

    def enter(node: N) -> N:
        NODES[kind] = node
        return node

    return enter


def round_result(values: torch.Tensor, dtype: DType, out: torch.Tensor, scratch: ThreadScratch, guard: Guard) -> None:
    """Round once to ``dtype``, then widen to what the caller works in (exact) if that differs.

    Raises:
        NonFiniteError: the guard looks at results, and one is not finite or becomes so by rounding.
    """
    target = TORCH_DTYPES[dtype]
    if guard.result:
        guard.check(values, target)
    if target in (out.dtype, values.dtype):
        round_into(values, out, scratch)
    else:
        rounded = scratch.take(values.numel(), target)
        round_into(values, rounded, scratch)
        round_into(rounded, out, scratch)


def fill_parallel(
    node: Node,
    start: int,
    stop: int,
    out: torch.Tensor,
    pool: ComputePool,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> None:
    """Fill ``[start, stop)`` chunk by chunk on the pool's threads."""
    num_chunks = -(-(stop - start) // chunk_elements)

    def run(first: int, last: int) -> None:
        scratch = pool.scratch
        mark = scratch.mark()
        try:
            for index in range(first, last):
                low = start + index * chunk_elements
                high = min(low + chunk_elements, stop)
                node.fill(low, high, out[low - start : high - start])
                scratch.release(mark)
        finally:
            scratch.release(mark)

    pool.map_runs(num_chunks, run)


_UNGUARDED: Final = Guard()


@node_of(Gather)
@node_of(Load)
class LoadNode:
    """Widens what is in memory."""

    def __init__(self, leaf: Stored, compilation: Compilation, guard: Guard) -> None:
        self.spec = leaf.spec
        self._piece = compilation.pieces[leaf]
        self._guard = guard if leaf.spec.dtype.is_floating else _UNGUARDED

    def prepare(self) -> None:
        """Nothing: the bytes are there."""

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        """See `Node.fill`."""
        out.copy_(self._piece.run(start, stop))
        if self._guard.inputs:
            self._guard.check(out)

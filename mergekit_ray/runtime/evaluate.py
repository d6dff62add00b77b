"""Evaluation of one expression, in cache-sized chunks.

An expression is compiled to nodes once per output tensor. A node fills any run of its elements into a scratch buffer
that stays in cache, so intermediates never touch main memory and scratch does not grow with the tensor. Chunks run on a
pool of threads; every number is independent of how the tensor was cut and of how many threads there were.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch

from mergekit_ray.core.declaration import Access
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.expressions import Cast, Expression, Load, Merge, Scale, loads
from mergekit_ray.core.registry import METHODS
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.methods.protocol import (
    BLOCK_ELEMENTS,
    Chunk,
    ElementwiseMethod,
    ReduceMethod,
    Scratch,
    WholeMethod,
)
from mergekit_ray.runtime.pool import ComputePool
from mergekit_ray.runtime.rounding import fits, is_finite, round_into
from mergekit_ray.runtime.scratch import TORCH_DTYPES, ThreadScratch

R = TypeVar("R")

CHUNK_ELEMENTS = 1 << 18
"""Elements handled at a time: 1 MiB per float32 buffer. Of 2^16 to 2^20, measured on two cores with dare_ties,
2^18 and 2^19 took the least time; smaller ones spend it on waiting for the interpreter, larger ones on memory."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The bytes of one `Load` (or a window of it) in memory.

    Attributes:
        data: 1-D tensor of the load's own dtype.
        start: flat index of its first element in the whole tensor.
    """

    data: torch.Tensor
    start: int


@dataclass(slots=True)
class _Guard:
    """Whether a node looks for NaN and infinities: in what it loads, in what it rounds."""

    inputs: bool = False
    result: bool = False


_UNGUARDED = _Guard()


class _Node(Protocol):
    spec: TensorSpec

    def prepare(self) -> None: ...

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None: ...


class _LoadNode:
    def __init__(self, load: Load, piece: Piece, guard: _Guard) -> None:
        self.spec = load.spec
        self._piece = piece
        self._guard = guard if load.spec.dtype.is_floating else _UNGUARDED

    def prepare(self) -> None:
        pass

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        out.copy_(self._piece.data[start - self._piece.start : stop - self._piece.start])
        if self._guard.inputs and not is_finite(out):
            raise _NonFiniteError


class _CastNode:
    def __init__(self, x: _Node, spec: TensorSpec, pool: ComputePool, guard: _Guard) -> None:
        self.spec = spec
        self._x = x
        self._pool = pool
        self._guard = guard

    def prepare(self) -> None:
        self._x.prepare()

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        inner = self._pool.scratch.take(stop - start, TORCH_DTYPES[self._x.spec.dtype])
        self._x.fill(start, stop, inner)
        _round_into(inner, self.spec.dtype, out, self._pool.scratch, self._guard)


class _ScaleNode:
    def __init__(self, x: _Node, node: Scale, pool: ComputePool, guard: _Guard) -> None:
        self._guard = guard
        self.spec = node.spec
        self._x = x
        self._factor = node.factor
        self._compute_dtype = TORCH_DTYPES[node.compute_dtype]
        self._pool = pool

    def prepare(self) -> None:
        self._x.prepare()

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        values = self._pool.scratch.take(stop - start, self._compute_dtype)
        self._x.fill(start, stop, values)
        values.mul_(self._factor)
        _round_into(values, self.spec.dtype, out, self._pool.scratch, self._guard)


class _Chunk:
    """See `mergekit_ray.methods.protocol.Chunk`."""

    __slots__ = ("base", "inputs", "scratch", "start", "stop")

    def __init__(
        self, start: int, stop: int, inputs: Sequence[torch.Tensor], base: torch.Tensor | None, scratch: Scratch
    ) -> None:
        self.start = start
        self.stop = stop
        self.inputs = inputs
        self.base = base
        self.scratch = scratch


class _MergeNode:
    """A merge; also the `Operands` its method sees."""

    def __init__(self, node: Merge, inputs: list[_Node], base: _Node | None, pool: ComputePool, guard: _Guard) -> None:
        self._guard = guard
        self.spec = node.spec
        method = METHODS.get(node.method)
        self._method = method()
        self._inputs = inputs
        self._base = base
        self._pool = pool
        self._statistics: Any = None
        self.shape = node.spec.shape
        self.num_elements = node.spec.num_elements
        self.num_inputs = len(inputs)
        self.parameters: Any = method.global_parameters.model_validate(dict(node.parameters))
        self.input_parameters: Sequence[Any] = [
            method.model_parameters.model_validate(dict(p)) for p in node.input_parameters
        ]
        self.keys: Sequence[str] = node.keys
        self.compute_dtype = TORCH_DTYPES[node.compute_dtype]
        self._access = method.effective_access(dict(node.parameters))
        self._whole: torch.Tensor | None = None

    def prepare(self) -> None:
        for child in self._inputs:
            child.prepare()
        if self._base is not None:
            self._base.prepare()
        if isinstance(self._method, WholeMethod):
            inputs = [self._whole_of(x) for x in self._inputs]
            base = None if self._base is None else self._whole_of(self._base)
            self._whole = self._method.combine_whole(inputs, base, self).reshape(-1)
        elif isinstance(self._method, ReduceMethod) and self._access is not Access.ELEMENTWISE:
            self._statistics = self._method.statistics(self)

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        if self._whole is not None:
            _round_into(self._whole[start:stop], self.spec.dtype, out, self._pool.scratch, self._guard)
            return
        method = cast(ElementwiseMethod, self._method)
        chunk = self._chunk(start, stop)
        merged = method.combine(chunk, self, self._statistics)
        _round_into(merged, self.spec.dtype, out, self._pool.scratch, self._guard)

    def map_blocks(self, function: Callable[[Chunk], R]) -> list[R]:
        num_blocks = -(-self.num_elements // BLOCK_ELEMENTS)

        def run(first: int, last: int) -> list[R]:
            return [self.block(index, function) for index in range(first, last)]

        return [result for results in self._pool.map_runs(num_blocks, run) for result in results]

    def block(self, index: int, function: Callable[[Chunk], R]) -> R:
        start = index * BLOCK_ELEMENTS
        scratch = self._pool.scratch
        mark = scratch.mark()
        try:
            return function(self._chunk(start, min(start + BLOCK_ELEMENTS, self.num_elements)))
        finally:
            scratch.release(mark)

    def _chunk(self, start: int, stop: int) -> _Chunk:
        scratch = self._pool.scratch
        tensors = [scratch.take(stop - start, self.compute_dtype) for _ in self._inputs]
        for node, tensor in zip(self._inputs, tensors, strict=True):
            node.fill(start, stop, tensor)
        base = None
        if self._base is not None:
            base = scratch.take(stop - start, self.compute_dtype)
            self._base.fill(start, stop, base)
        return _Chunk(start, stop, tensors, base, scratch)

    def _whole_of(self, node: _Node) -> torch.Tensor:
        whole = torch.empty(self.num_elements, dtype=self.compute_dtype)
        _fill_parallel(node, 0, self.num_elements, whole, self._pool, CHUNK_ELEMENTS)
        return whole.view(self.shape)


class Evaluation:
    """One expression over inputs in memory.

    Args:
        expression: to be computed.
        pieces: the bytes of each of its loads: all of the tensor, or the window that will be asked for.
        pool: threads to compute on.
        chunk_elements: elements handled at a time; changes speed, never the result.
        allow_non_finite: let NaN and infinities pass.
        references: the models as the recipe names them, by key, for messages.

    The constructor runs the methods' statistics, so the pieces must be complete then.
    """

    def __init__(
        self,
        expression: Expression,
        pieces: Mapping[Load, Piece],
        pool: ComputePool,
        *,
        chunk_elements: int = CHUNK_ELEMENTS,
        allow_non_finite: bool = False,
        references: Mapping[str, str] | None = None,
    ) -> None:
        self._references = references or {}
        self._expression = expression
        self._pieces = pieces
        self._pool = pool
        self._chunk_elements = chunk_elements
        self._check_finite = not allow_non_finite
        # Every element passes through `fill` once, so statistics are taken unguarded.
        guard = _Guard()
        result_guard = _Guard(result=self._check_finite and expression.spec.dtype.is_floating)
        self._node = self._compile(expression, guard, result_guard)
        try:
            self._node.prepare()
        except (_NonFiniteError, ValueError, ArithmeticError, RuntimeError):
            self._name_non_finite_inputs()
            raise
        guard.inputs = self._check_finite and (isinstance(expression, Load) or not _propagates(expression))

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        """Write elements ``[start, stop)`` to ``out``, a 1-D tensor of the expression's dtype.

        Raises:
            MergeError: an input or the result is not finite (unless allowed); names the tensor and the model.
        """
        try:
            _fill_parallel(self._node, start, stop, out, self._pool, self._chunk_elements)
        except _NonFiniteError:
            self._name_non_finite_inputs()
            dtype = self._expression.spec.dtype
            raise MergeError(
                f"the merged values overflow {dtype.config_name} or are not numbers, though all inputs are finite",
                where=f"tensor {self._expression.spec.name!r}",
                remedy="check weights and scales, choose a dtype with more range (bfloat16, float32), "
                "or pass --allow-non-finite",
            ) from None

    def _compile(self, expression: Expression, guard: _Guard, own_guard: _Guard) -> _Node:
        """Nodes of a tree; ``own_guard`` is the root's, ``guard`` that of all below."""
        match expression:
            case Load():
                return _LoadNode(expression, self._pieces[expression], guard)
            case Cast(x):
                return _CastNode(self._compile(x, guard, guard), expression.spec, self._pool, own_guard)
            case Scale(x):
                return _ScaleNode(self._compile(x, guard, guard), expression, self._pool, own_guard)
            case Merge():
                inputs = [self._compile(x, guard, guard) for x in expression.inputs]
                base = None if expression.base is None else self._compile(expression.base, guard, guard)
                return _MergeNode(expression, inputs, base, self._pool, own_guard)

    def _name_non_finite_inputs(self) -> None:
        """Raise for the first input that holds a NaN or an infinity, if there is one."""
        if not self._check_finite:
            return
        for load in loads(self._expression):
            if not load.spec.dtype.is_floating:
                continue
            piece = self._pieces[load]
            bad = torch.nonzero(~torch.isfinite(piece.data))
            if len(bad):
                index = int(bad[0])
                raise MergeError(
                    f"{float(piece.data[index])} in the input, first at flat index {piece.start + index} "
                    f"({len(bad)} such values read)",
                    where=f"model {self._references.get(load.model, load.model)}, tensor {load.spec.name!r}",
                    remedy="use an undamaged checkpoint, or pass --allow-non-finite to merge it as it is",
                )


def check_copy_finite(load: Load, data: torch.Tensor, start: int, reference: str | None = None) -> None:
    """Refuse NaN and infinities in a tensor that is copied.

    Args:
        load: what was read.
        data: a window of it.
        start: flat index of the window's first element.
        reference: the model as the recipe names it, for messages.

    Raises:
        MergeError: naming the model, the tensor and the first index.
    """
    if not load.spec.dtype.is_floating:
        return
    for i in range(0, data.numel(), CHUNK_ELEMENTS):
        if not is_finite(data[i : i + CHUNK_ELEMENTS]):
            index = i + int(torch.nonzero(~torch.isfinite(data[i : i + CHUNK_ELEMENTS]))[0])
            raise MergeError(
                f"{float(data[index])} in the input, first at flat index {start + index}",
                where=f"model {reference or load.model}, tensor {load.spec.name!r}",
                remedy="use an undamaged checkpoint, or pass --allow-non-finite to copy it as it is",
            )


class _NonFiniteError(Exception):
    """A NaN or infinity was met; who it belongs to is found out afterwards."""


def _propagates(expression: Expression) -> bool:
    """Whether a non-finite input always shows in the result."""
    match expression:
        case Load():
            return True
        case Cast(x) | Scale(x):
            return _propagates(x)
        case Merge(method, _, inputs, base):
            below = inputs if base is None else (*inputs, base)
            return METHODS.get(method).propagates_non_finite and all(_propagates(x) for x in below)


def _round_into(values: torch.Tensor, dtype: DType, out: torch.Tensor, scratch: ThreadScratch, guard: _Guard) -> None:
    """Round once to ``dtype``, then widen to what the caller works in (exact) if that differs."""
    target = TORCH_DTYPES[dtype]
    if guard.result and not fits(values, target):
        raise _NonFiniteError
    if target in (out.dtype, values.dtype):
        round_into(values, out, scratch)
    else:
        rounded = scratch.take(values.numel(), target)
        round_into(values, rounded, scratch)
        round_into(rounded, out, scratch)


def _fill_parallel(
    node: _Node,
    start: int,
    stop: int,
    out: torch.Tensor,
    pool: ComputePool,
    chunk_elements: int,
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

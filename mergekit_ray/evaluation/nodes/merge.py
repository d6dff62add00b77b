"""Merging: runs a method over its operands, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch

from mergekit_ray.core.declaration import Access
from mergekit_ray.core.expressions import Expression, Merge
from mergekit_ray.core.registry import METHODS
from mergekit_ray.evaluation.nodes.base import Compilation, Guard, Node, fill_parallel, node_of, round_result
from mergekit_ray.evaluation.pool import ComputePool
from mergekit_ray.evaluation.scratch import TORCH_DTYPES
from mergekit_ray.methods.shared.protocol import (
    Chunk,
    ElementwiseMethod,
    ReduceMethod,
    WholeMethod,
)
from mergekit_ray.methods.shared.scratch import Scratch

R = TypeVar("R")


class _Chunk:
    """See `mergekit_ray.methods.shared.protocol.Chunk`."""

    __slots__ = ("base", "inputs", "scratch", "start", "stop")

    def __init__(
        self, start: int, stop: int, inputs: Sequence[torch.Tensor], base: torch.Tensor | None, scratch: Scratch
    ) -> None:
        self.start = start
        self.stop = stop
        self.inputs = inputs
        self.base = base
        self.scratch = scratch


class _Held:
    """A merged input of a method that looks at each element several times: computed once."""

    def __init__(self, node: Node, pool: ComputePool) -> None:
        self.spec = node.spec
        self._node = node
        self._pool = pool
        self._whole: torch.Tensor | None = None

    def prepare(self) -> None:
        """Compute it; two parents may ask."""
        if self._whole is None:
            self._node.prepare()
            dtype = TORCH_DTYPES[self.spec.dtype]
            self._whole = torch.empty(self.spec.num_elements, dtype=dtype, device=self._pool.device)
            fill_parallel(self._node, 0, self.spec.num_elements, self._whole, self._pool)

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        """See `Node.fill`."""
        assert self._whole is not None
        out.copy_(self._whole[start:stop])


@node_of(Merge)
class MergeNode:
    """A merge; also the `Operands` its method sees."""

    def __init__(self, node: Merge, compilation: Compilation, guard: Guard) -> None:
        self._guard = guard
        self.spec = node.spec
        method = METHODS.get(node.method)
        self._method = method()
        kept = node.held
        held = [_Held(compilation.compile(x), compilation.pool) for x in kept]

        def made(x: Expression) -> Node:
            return held[kept.index(x)] if x in kept else compilation.compile(x)

        self._inputs = [made(x) for x in node.inputs]
        self._base = None if node.base is None else made(node.base)
        self._pool = compilation.pool
        self.block_elements = compilation.pool.block_elements
        self._statistics: Any = None
        self.shape = node.spec.shape
        self.num_elements = node.spec.num_elements
        self.num_inputs = len(node.inputs)
        self.parameters: Any = method.global_parameters.model_validate(dict(node.parameters))
        self.input_parameters: Sequence[Any] = [
            method.model_parameters.model_validate(dict(p)) for p in node.input_parameters
        ]
        self.keys: Sequence[str] = node.keys
        self.compute_dtype = TORCH_DTYPES[node.compute_dtype]
        self._access = method.effective_access(dict(node.parameters))
        self._whole: torch.Tensor | None = None

    def prepare(self) -> None:
        """Statistics of the whole tensor, or all of a method that cannot be cut."""
        for child in [*self._inputs, *([] if self._base is None else [self._base])]:
            child.prepare()
        if isinstance(self._method, WholeMethod):
            inputs = [self._whole_of(x) for x in self._inputs]
            base = None if self._base is None else self._whole_of(self._base)
            self._whole = self._method.combine_whole(inputs, base, self).reshape(-1)
        elif isinstance(self._method, ReduceMethod) and self._access is not Access.ELEMENTWISE:
            self._statistics = self._method.statistics(self)

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        """See `Node.fill`."""
        if self._whole is not None:
            round_result(self._whole[start:stop], self.spec.dtype, out, self._pool.scratch, self._guard)
            return
        scratch = self._pool.scratch
        mark = scratch.mark()
        method = cast(ElementwiseMethod, self._method)
        chunk = self._chunk(start, stop)
        merged = method.combine(chunk, self, self._statistics)
        round_result(merged, self.spec.dtype, out, scratch, self._guard)
        scratch.release(mark)

    def map_blocks(self, function: Callable[[Chunk], R], block_elements: int | None = None) -> list[R]:
        """See `Operands.map_blocks`."""
        size = block_elements or self.block_elements
        num_blocks = -(-self.num_elements // size)

        def run(first: int, last: int) -> list[R]:
            return [self._block(index, function, size) for index in range(first, last)]

        return [result for results in self._pool.map_runs(num_blocks, run) for result in results]

    def map_some(self, indices: Sequence[int], function: Callable[[Chunk], R]) -> list[R]:
        """See `Operands.map_some`."""

        def run(first: int, last: int) -> list[R]:
            return [self._block(index, function, self.block_elements) for index in indices[first:last]]

        return [result for results in self._pool.map_runs(len(indices), run) for result in results]

    def block(self, index: int, function: Callable[[Chunk], R]) -> R:
        """See `Operands.block`."""
        return self._block(index, function, self.block_elements)

    def _block(self, index: int, function: Callable[[Chunk], R], block_elements: int) -> R:
        start = index * block_elements
        scratch = self._pool.scratch
        mark = scratch.mark()
        try:
            return function(self._chunk(start, min(start + block_elements, self.num_elements)))
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

    def _whole_of(self, node: Node) -> torch.Tensor:
        whole = torch.empty(self.num_elements, dtype=self.compute_dtype, device=self._pool.device)
        fill_parallel(node, 0, self.num_elements, whole, self._pool)
        return whole.view(self.shape)

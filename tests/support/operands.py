"""`Operands`, `Chunk` and `Scratch` over tensors in memory: the plainest evaluator that keeps the protocol's promises.

It is also a strict one: working memory starts as NaN and is NaN again once a call has returned, so a method that reads
memory before writing it, or keeps it beyond its call, shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from mergekit_ray.core.declaration import Access
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared.protocol import BLOCK_ELEMENTS, ElementwiseMethod, ReduceMethod

R = TypeVar("R")


class MemoryScratch:
    """Fresh memory for every request, spoilt at the end."""

    def __init__(self) -> None:
        self._given: list[torch.Tensor] = []

    def like(self, x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        given = torch.empty_like(x, dtype=dtype or x.dtype)
        self._given.append(given)
        spoil(given)
        return given

    def spoil(self) -> None:
        for given in self._given:
            spoil(given)


def spoil(x: torch.Tensor) -> None:
    if x.is_floating_point():
        x.fill_(float("nan"))
    else:
        x.fill_(torch.iinfo(x.dtype).max)


class MemoryChunk:
    def __init__(self, operands: MemoryOperands, start: int, stop: int) -> None:
        self.start, self.stop = start, stop
        dtype = operands.compute_dtype
        # A copy also where the dtype is right: chunks may be overwritten, models may not.
        self.inputs: Sequence[torch.Tensor] = [x[start:stop].to(dtype, copy=True) for x in operands.inputs]
        self.base = None if operands.base is None else operands.base[start:stop].to(dtype, copy=True)
        self.scratch = MemoryScratch()

    def spoil(self) -> None:
        self.scratch.spoil()
        for x in (*self.inputs, self.base):
            if x is not None:
                spoil(x)


class MemoryOperands:
    """A merge of whole tensors of one shape.

    Args:
        inputs: one tensor per model.
        base: the base's tensor, if any.
        parameters: an instance of the method's global parameters.
        input_parameters: one instance of its model parameters per model.
        keys: seeds of randomness, one per model.
    """

    def __init__(
        self,
        inputs: Sequence[torch.Tensor],
        base: torch.Tensor | None = None,
        *,
        parameters: Any = None,
        input_parameters: Sequence[Any] = (),
        keys: Sequence[str] = (),
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.shape = tuple(inputs[0].shape)
        self.num_elements = inputs[0].numel()
        self.num_inputs = len(inputs)
        self.inputs = [x.reshape(-1) for x in inputs]
        self.base = None if base is None else base.reshape(-1)
        self.parameters = parameters
        self.input_parameters = input_parameters
        self.keys = keys or [f"model {index}" for index in range(len(inputs))]
        self.compute_dtype = compute_dtype
        self.block_elements = BLOCK_ELEMENTS
        self.blocks_read = 0

    def map_blocks(self, function: Callable[[Any], R], block_elements: int | None = None) -> list[R]:
        num_blocks = -(-self.num_elements // (block_elements or self.block_elements))
        return [self.block(index, function, block_elements) for index in range(num_blocks)]

    def map_some(self, indices: Sequence[int], function: Callable[[Any], R]) -> list[R]:
        return [self.block(index, function) for index in indices]

    def block(self, index: int, function: Callable[[Any], R], block_elements: int | None = None) -> R:
        size = block_elements or self.block_elements
        assert 0 <= index * size < self.num_elements
        self.blocks_read += 1
        start = index * size
        chunk = MemoryChunk(self, start, min(start + size, self.num_elements))
        result = function(chunk)
        chunk.spoil()
        return result


def merge(
    name: str,
    inputs: Sequence[torch.Tensor],
    base: torch.Tensor | None = None,
    *,
    parameters: Mapping[str, Any] | None = None,
    input_parameters: Sequence[Mapping[str, Any]] | None = None,
    keys: Sequence[str] = (),
    compute_dtype: torch.dtype = torch.float32,
    out_dtype: torch.dtype | None = None,
    chunk_elements: int | None = None,
) -> torch.Tensor:
    """The merged tensor in ``out_dtype`` (default: of the first input); parameters by their YAML names."""
    declaration = METHODS.get(name)
    given = dict(parameters or {})
    operands = MemoryOperands(
        inputs,
        base,
        parameters=declaration.global_parameters.model_validate(given),
        input_parameters=[
            declaration.model_parameters.model_validate(dict(each)) for each in input_parameters or [{}] * len(inputs)
        ],
        keys=keys,
        compute_dtype=compute_dtype,
    )
    method = declaration()
    assert isinstance(method, ElementwiseMethod)
    statistics = None
    if isinstance(method, ReduceMethod) and declaration.effective_access(given) is not Access.ELEMENTWISE:
        statistics = method.statistics(operands)
    out = torch.empty(operands.num_elements, dtype=out_dtype or inputs[0].dtype)
    step = chunk_elements or max(operands.num_elements, 1)
    for start in range(0, operands.num_elements, step):
        chunk = MemoryChunk(operands, start, min(start + step, operands.num_elements))
        result = method.combine(chunk, operands, statistics)
        assert result.dtype == compute_dtype
        assert result.shape == (chunk.stop - chunk.start,)
        out[chunk.start : chunk.stop] = result
        chunk.spoil()
    return out.view(operands.shape)

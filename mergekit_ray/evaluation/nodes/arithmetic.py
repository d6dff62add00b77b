"""Rounding and scaling; merging is in `mergekit_ray.evaluation.nodes.merge`."""

from __future__ import annotations

import torch

from mergekit_ray.core.expressions import Cast, Scale
from mergekit_ray.evaluation.nodes.base import Compilation, Guard, node_of, round_result
from mergekit_ray.evaluation.nodes.merge import MergeNode
from mergekit_ray.evaluation.scratch import TORCH_DTYPES

__all__ = ["CastNode", "MergeNode", "ScaleNode"]


@node_of(Cast)
class CastNode:
    """Rounds once."""

    def __init__(self, cast: Cast, compilation: Compilation, guard: Guard) -> None:
        self.spec = cast.spec
        self._x = compilation.compile(cast.x)
        self._pool = compilation.pool
        self._guard = guard

    def prepare(self) -> None:
        """Prepares what is below."""
        self._x.prepare()

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        """See `Node.fill`."""
        inner = self._pool.scratch.take(stop - start, TORCH_DTYPES[self._x.spec.dtype])
        self._x.fill(start, stop, inner)
        round_result(inner, self.spec.dtype, out, self._pool.scratch, self._guard)


@node_of(Scale)
class ScaleNode:
    """Multiplies in compute dtype, rounds once."""

    def __init__(self, scale: Scale, compilation: Compilation, guard: Guard) -> None:
        self.spec = scale.spec
        self._x = compilation.compile(scale.x)
        self._factor = scale.factor
        self._compute_dtype = TORCH_DTYPES[scale.compute_dtype]
        self._pool = compilation.pool
        self._guard = guard

    def prepare(self) -> None:
        """Prepares what is below."""
        self._x.prepare()

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        """See `Node.fill`."""
        values = self._pool.scratch.take(stop - start, self._compute_dtype)
        self._x.fill(start, stop, values)
        values.mul_(self._factor)
        round_result(values, self.spec.dtype, out, self._pool.scratch, self._guard)

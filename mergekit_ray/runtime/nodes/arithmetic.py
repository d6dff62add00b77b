"""Loading, rounding, scaling."""

from __future__ import annotations

import torch

from mergekit_ray.core.expressions import Cast, Load, Scale
from mergekit_ray.runtime.nodes.base import Compilation, Guard, NonFiniteError, node_of, round_result
from mergekit_ray.runtime.rounding import is_finite
from mergekit_ray.runtime.scratch import TORCH_DTYPES

_UNGUARDED = Guard()


@node_of(Load)
class LoadNode:
    """Widens what lies in memory."""

    def __init__(self, load: Load, compilation: Compilation, guard: Guard) -> None:
        self.spec = load.spec
        self._piece = compilation.pieces[load]
        self._guard = guard if load.spec.dtype.is_floating else _UNGUARDED

    def prepare(self) -> None:
        """Nothing: the bytes are there."""

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        """See `Node.fill`."""
        out.copy_(self._piece.run(start, stop))
        if self._guard.inputs and not is_finite(out):
            raise NonFiniteError


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

"""Loading."""

from __future__ import annotations

import torch

from mergekit_ray.core.expressions import Load
from mergekit_ray.runtime.nodes.base import Compilation, Guard, node_of

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
        if self._guard.inputs:
            self._guard.check(out)

"""Low-rank factors and singular values, by the eigenvectors of the smaller Gram matrix in float64.

The singular vectors of the short side of ``x`` are the eigenvectors of ``x xᵀ`` (or ``xᵀ x``), which is small. Squaring
loses singular values below 1e-8 of the largest, less than float32 has to say of a matrix. The factors are projections
on these vectors, so ``b @ a`` is the best approximation to float64's accuracy even where the values themselves are not.
Of a matrix with NaN or infinities, everything is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from mergekit_ray.core.expressions import LowRankFactors, SingularValues
from mergekit_ray.evaluation.nodes.base import Compilation, Guard, Node, fill_parallel, node_of, round_result
from mergekit_ray.evaluation.pool import ComputePool
from mergekit_ray.evaluation.scratch import TORCH_DTYPES

_BLOCK_ELEMENTS = 1 << 20
"""Elements of the matrix widened to float64 at a time. Fixed: sums over blocks depend on it."""


@node_of(LowRankFactors)
class LowRankFactorsNode:
    """Factors and norms, computed at one go."""

    def __init__(self, node: LowRankFactors, compilation: Compilation, guard: Guard) -> None:
        self.spec = node.spec
        self._rank, self._transposed = node.rank, node.transposed
        self._dtype = TORCH_DTYPES[node.dtype]
        self._x = compilation.compile(node.x)
        self._pool = compilation.pool
        self._guard = guard
        self._result = torch.empty(0)

    def prepare(self) -> None:
        """All of the work."""
        self._x.prepare()
        whole = _whole(self._x, self._pool)
        if self._rank == 0:
            norm = _norm(block.double() for block in _blocks(whole.view(-1, 1)))
            self._result = torch.stack([norm, norm])
            return
        matrix = whole.t() if self._transposed else whole
        gram = _gram(matrix)
        if not torch.isfinite(gram).all():
            self._result = gram.new_full(self.spec.shape, math.nan)
            return
        if not gram.any():
            self._result = gram.new_zeros(self.spec.shape)
            return
        b, a = (factor.to(self._dtype).double() for factor in _factors(matrix, gram, self._rank))
        left = _norm(
            block.double().sub_(b[rows] @ a) for rows, block in zip(_rows(matrix), _blocks(matrix), strict=True)
        )
        whole_norm = _norm(block.double() for block in _blocks(matrix))
        self._result = torch.cat([b.reshape(-1), a.reshape(-1), torch.stack([left, whole_norm])])

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        """See `Node.fill`."""
        round_result(self._result[start:stop], self.spec.dtype, out, self._pool.scratch, self._guard)


@node_of(SingularValues)
class SingularValuesNode:
    """Square roots of the Gram matrix's eigenvalues."""

    def __init__(self, node: SingularValues, compilation: Compilation, guard: Guard) -> None:
        self.spec = node.spec
        self._x = compilation.compile(node.x)
        self._pool = compilation.pool
        self._guard = guard
        self._result = torch.empty(0)

    def prepare(self) -> None:
        """All of the work."""
        self._x.prepare()
        gram = _gram(_whole(self._x, self._pool))
        if torch.isfinite(gram).all():
            self._result = torch.linalg.eigvalsh(gram).flip(0).clamp_(min=0.0).sqrt_()
        else:
            self._result = gram.new_full(self.spec.shape, math.nan)

    def fill(self, start: int, stop: int, out: torch.Tensor) -> None:
        """See `Node.fill`."""
        round_result(self._result[start:stop], self.spec.dtype, out, self._pool.scratch, self._guard)


def _whole(node: Node, pool: ComputePool) -> torch.Tensor:
    """All of a tensor in float32."""
    whole = torch.empty(node.spec.num_elements, dtype=torch.float32, device=pool.device)
    fill_parallel(node, 0, node.spec.num_elements, whole, pool)
    return whole.view(node.spec.shape)


def _norm(blocks: Iterable[torch.Tensor]) -> torch.Tensor:
    """The Euclidean norm of float64 blocks, which are overwritten; left on their device."""
    return sum((block.square_().sum() for block in blocks), torch.zeros(())).sqrt()


def _rows(matrix: torch.Tensor) -> list[slice]:
    """Fixed runs of rows."""
    step = max(1, _BLOCK_ELEMENTS // max(1, matrix.shape[1]))
    return [slice(first, first + step) for first in range(0, matrix.shape[0], step)]


def _blocks(matrix: torch.Tensor) -> list[torch.Tensor]:
    return [matrix[rows] for rows in _rows(matrix)]


def _gram(matrix: torch.Tensor) -> torch.Tensor:
    """``x xᵀ`` or ``xᵀ x``, whichever is smaller, in float64."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.t()
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=tall.device)
    for block in _blocks(tall):
        wide = block.double()
        gram.addmm_(wide.t(), wide)
    return gram


def _factors(matrix: torch.Tensor, gram: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``U √S`` and ``√S Vᵀ`` in float64, the largest singular values first; zeros where there are none."""
    _, vectors = torch.linalg.eigh(gram)
    short = vectors[:, vectors.shape[1] - rank :].flip(1)
    del vectors
    # A vector and its opposite serve alike: the larger end is made positive, whatever the solver gave.
    largest = short.gather(0, short.abs().argmax(0, keepdim=True))
    short = short * torch.where(largest < 0, -1.0, 1.0)
    is_wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.t() if is_wide else matrix
    long = torch.cat([block.double() @ short for block in _blocks(tall)])  # |column i| is the singular value
    roots = long.norm(dim=0).sqrt_()
    inverse = torch.where(roots > 0, 1.0 / roots, 0.0)
    short, long = short * roots, long * inverse
    return (short, long.t()) if is_wide else (long, short.t())

"""Inner products of the models, or of their task vectors, over a whole tensor.

Means on a sphere stay in the span of the vectors they are means of. So one pass over the tensor takes all inner
products; what follows, iterations too, is arithmetic on one coefficient per model in double precision; and the result
is one weighted sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

from mergekit_ray.methods.accumulate import weighted_sum_
from mergekit_ray.methods.protocol import Chunk, Operands
from mergekit_ray.methods.sums import partial_sums, total
from mergekit_ray.methods.task_vectors import task_vectors

if TYPE_CHECKING:
    import torch

Matrix: TypeAlias = list[list[float]]
"""The Gram matrix: ``matrix[i][j]`` is the inner product of vectors ``i`` and ``j``."""


def vectors(chunk: Chunk) -> Sequence[torch.Tensor]:
    """Runs of the vectors that are compared and summed: task vectors where there is a base, else the models.

    Task vectors take the place of the inputs.
    """
    return chunk.inputs if chunk.base is None else task_vectors(chunk)[1]


def num_products(num_vectors: int) -> int:
    """Pairs ``i <= j``."""
    return num_vectors * (num_vectors + 1) // 2


def products(chunk: Chunk) -> Iterator[torch.Tensor]:
    """Element-wise products of each pair ``i <= j`` of vectors, row by row of the upper triangle.

    They are formed in float64, where products of float32 or shorter numbers are exact and in range. Each is a 1-D run
    in the same scratch, to be used (it may be overwritten) before the next is asked for.
    """
    import torch  # noqa: PLC0415 - declarations are read without torch

    runs = vectors(chunk)
    wide = chunk.scratch.like(runs[0], torch.float64)
    product = chunk.scratch.like(runs[0], torch.float64)
    for i, run in enumerate(runs):
        wide.copy_(run)
        for other in runs[i:]:
            yield product.copy_(other).mul_(wide)


def inner_products(operands: Operands) -> list[float]:
    """Inner products of each pair ``i <= j`` of vectors over the whole tensor, in the order of `products`.

    All NaN if any is not finite: a NaN or infinity in the tensors, or squares beyond float64.
    """
    blocks = operands.map_blocks(lambda chunk: [partial_sums(product, product) for product in products(chunk)])
    try:
        found = [total(block[pair] for block in blocks) for pair in range(num_products(operands.num_inputs))]
    except (OverflowError, ValueError):  # the sum of infinities, or beyond float64
        found = [math.nan]
    return found if all(map(math.isfinite, found)) else [math.nan] * num_products(operands.num_inputs)


def gram_matrix(operands: Operands) -> Matrix:
    """`inner_products` as a symmetric matrix."""
    upper = iter(inner_products(operands))
    size = operands.num_inputs
    matrix = [[0.0] * size for _ in range(size)]
    for i in range(size):
        for j in range(i, size):
            matrix[i][j] = matrix[j][i] = next(upper)
    return matrix


def span_coefficients(operands: Operands, rule: Callable[[Matrix], list[float]]) -> list[float]:
    """``rule`` of the Gram matrix: one coefficient per vector, all NaN where the matrix is."""
    matrix = gram_matrix(operands)
    return [math.nan] * len(matrix) if math.isnan(matrix[0][0]) else rule(matrix)


def norms(matrix: Matrix) -> list[float]:
    """Euclidean norms of the vectors."""
    return [math.sqrt(matrix[i][i]) for i in range(len(matrix))]


def inner(a: Sequence[float], matrix: Matrix, b: Sequence[float]) -> float:
    """Inner product of the sums ``Σ a_i v_i`` and ``Σ b_i v_i``."""
    return math.fsum(
        a_i * b_j * entry for a_i, row in zip(a, matrix, strict=True) for b_j, entry in zip(b, row, strict=True)
    )


def length(a: Sequence[float], matrix: Matrix) -> float:
    """Norm of ``Σ a_i v_i``. Where terms cancel it is known to some ``1e-8`` of their own norms, no better."""
    return math.sqrt(max(0.0, inner(a, matrix, a)))


def sum_of_vectors(chunk: Chunk, coefficients: Sequence[float]) -> torch.Tensor:
    """``Σ c_i v_i``, plus the base where the vectors are task vectors."""
    summed = weighted_sum_(vectors(chunk), coefficients)
    return summed if chunk.base is None else chunk.base.add_(summed)

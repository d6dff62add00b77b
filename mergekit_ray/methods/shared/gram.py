"""Inner products of the models, or of their task vectors, over a whole tensor.

Means on a sphere stay in the span of the vectors they are means of. So one pass over the tensor takes all inner
products; what follows, iterations too, is arithmetic on one coefficient per model in double precision; and the result
is one weighted sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, TypeAlias

from mergekit_ray.core.dtypes import DType
from mergekit_ray.methods.compiled import is_single_on_cpu
from mergekit_ray.methods.shared.accumulate import weighted_sum_
from mergekit_ray.methods.shared.protocol import Chunk, Operands
from mergekit_ray.methods.shared.sums import partial_sums
from mergekit_ray.methods.shared.task_vectors import task_vectors

if TYPE_CHECKING:
    import numpy as np
    import torch

DOT_ELEMENTS = 1 << 16
"""Elements in a partial sum of an inner product: a few such runs stay in the cache of a core."""

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
    return summed_products(operands.map_blocks(_block_products), num_products(operands.num_inputs))


def summed_products(blocks: Sequence[Sequence[Sequence[float]]], number: int) -> list[float]:
    """So many inner products from their partial sums by block, all NaN if one is not finite.

    Partial sums are added without rounding but the last, so their order does not matter.
    """
    try:
        found = [math.fsum(chain.from_iterable(block[pair] for block in blocks)) for pair in range(number)]
    except (OverflowError, ValueError):  # the sum of infinities, or beyond float64
        found = [math.nan]
    return found if all(map(math.isfinite, found)) else [math.nan] * number


def _block_products(chunk: Chunk) -> Sequence[Sequence[float]]:
    if is_single_on_cpu(chunk.inputs[0]):
        return dots([run.numpy() for run in vectors(chunk)])
    return [partial_sums(product, product).tolist() for product in products(chunk)]


def dots(runs: Sequence[np.ndarray]) -> Sequence[Sequence[float]]:
    """Partial sums of the inner products of each pair ``i <= j`` of float32 runs, on the CPU.

    One for every `DOT_ELEMENTS` elements, so runs are to begin where a multiple of that does, and to be contiguous.
    """
    import numpy as np  # noqa: PLC0415 - as torch is

    from mergekit_ray.methods.compiled import products as loops  # noqa: PLC0415 - compilers load where they are needed

    addresses = np.array([run.ctypes.data for run in runs], np.int64)
    found = loops.inner_products(addresses, [DType.F32] * len(runs), runs[0].size, DOT_ELEMENTS)
    sums: list[list[float]] = found.T.tolist()
    return sums


def gram_matrix(operands: Operands) -> Matrix:
    """`inner_products` as a symmetric matrix."""
    return as_matrix(inner_products(operands), operands.num_inputs)


def as_matrix(inner_products: Sequence[float], size: int) -> Matrix:
    """Inner products of each pair ``i <= j`` of so many vectors as a symmetric matrix."""
    upper = iter(inner_products)
    matrix = [[0.0] * size for _ in range(size)]
    for i in range(size):
        for j in range(i, size):
            matrix[i][j] = matrix[j][i] = next(upper)
    return matrix


def span_coefficients(operands: Operands, rule: Callable[[Matrix], list[float]]) -> list[float]:
    """``rule`` of the Gram matrix: one coefficient per vector, all NaN where the matrix is."""
    return coefficients_by(rule, gram_matrix(operands))


def coefficients_by(rule: Callable[[Matrix], list[float]], matrix: Matrix) -> list[float]:
    """``rule`` of the matrix, all NaN where that is."""
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

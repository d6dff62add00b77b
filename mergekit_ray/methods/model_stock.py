"""Model Stock: between the base and the models' mean, as far as the angles between task vectors say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mergekit_ray.core.declaration import BaseUse, Parameters
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared.combinations import Sum
from mergekit_ray.methods.shared.gram import as_matrix, inner_products, norms, num_products, products, sum_of_vectors
from mergekit_ray.methods.shared.protocol import Chunk, Operands, ReduceMethod, SummedTensor, SumMethod
from mergekit_ray.methods.shared.rows import Lines
from mergekit_ray.methods.shared.task_vectors import task_vectors

if TYPE_CHECKING:
    import torch

_POLE = 1e-6
"""A divisor ``1 + (N − 1) cos θ`` below this is taken as the zero it is where task vectors cancel."""


class ModelStockParameters(Parameters):
    """Global parameters of `ModelStock`."""

    filter_wise: bool = Field(
        False, description="one ratio for each row (vectors along the last dimension) instead of one for each tensor"
    )


@dataclass(frozen=True, slots=True)
class Ratios:
    """How far towards the mean.

    Attributes:
        shared: ``t/N`` of the whole tensor, if it has one.
        by_row: ``t/N`` of each row in compute dtype, otherwise.
        rows: the rows.
    """

    shared: float
    by_row: torch.Tensor | None
    rows: Lines


@METHODS.register("model_stock")
class ModelStock(SumMethod, ReduceMethod):
    """``t·mean(x_i) + (1 − t)·b`` with ``t = N cos θ / (1 + (N − 1) cos θ)`` (Jang et al. 2024).

    ``cos θ`` is the mean of the cosines between the task vectors of all pairs of the ``N`` models, each tensor one flat
    vector, or each of its rows with ``filter_wise`` (of a 3-D tensor: all vectors along the last dimension; a vector is
    one row). A task vector of zero has cosine 0 with the others. Cosines are true ones, however short the vectors are.
    Where ``cos θ`` is negative so is ``t``; where the task vectors balance out, ``1 + (N − 1) cos θ < 1e-6``, it is 0:
    the base. Where no model differs from the base, the result is the base, bit for bit.
    """

    name = "model_stock"
    summary = "Between base and mean of the models, by the angles between their task vectors."
    formula = "t·mean(x_i) + (1-t)·b, t = N·c/(1+(N-1)·c), c = mean over pairs of cos(x_i - b, x_j - b)"
    reference = "https://arxiv.org/abs/2403.19522"
    base = BaseUse.REQUIRED
    min_models = 2
    global_parameters = ModelStockParameters
    propagates_non_finite = True

    @classmethod
    def sum_of(cls, tensor: SummedTensor) -> Sum | None:
        """See `SumMethod.sum_of`."""
        num_models = len(tensor.input_parameters)
        if not _is_flat(tensor.parameters, Lines.along_last(tensor.shape), math.prod(tensor.shape)):
            return None
        return Sum([flat_ratio(tensor.inner_products(), num_models) / num_models] * num_models)

    def statistics(self, operands: Operands) -> Ratios:
        """The ratio of the tensor or of each row."""
        rows = Lines.along_last(operands.shape)
        if not _is_flat(operands.parameters, rows, operands.num_elements):
            summed = rows.sums(operands, products, num_products(operands.num_inputs))
            by_row = interpolation_ratios(summed, operands.num_inputs) / operands.num_inputs
            return Ratios(0.0, by_row.to(operands.compute_dtype), rows)
        return Ratios(flat_ratio(inner_products(operands), operands.num_inputs) / operands.num_inputs, None, rows)

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`; ``statistics`` are the `Ratios`."""
        ratios: Ratios = statistics
        if ratios.by_row is None:
            return sum_of_vectors(chunk, [ratios.shared] * operands.num_inputs)
        base, (change, *others) = task_vectors(chunk)
        for other in others:
            change.add_(other)
        return base.add_(ratios.rows.scale_(change, chunk.start, ratios.by_row))


def _is_flat(settings: ModelStockParameters, rows: Lines, num_elements: int) -> bool:
    """Whether the whole tensor is one vector."""
    return not settings.filter_wise or rows.num_lines <= 1 or not num_elements


def flat_ratio(inner: Sequence[float], num_models: int) -> float:
    """`interpolation_ratios` of one vector of each model, without torch; NaN where an inner product is."""
    matrix = as_matrix(inner, num_models)
    if math.isnan(matrix[0][0]):
        return math.nan
    sizes, mean = norms(matrix), 0.0
    for i in range(num_models):
        for j in range(i + 1, num_models):
            size = sizes[i] * sizes[j]
            mean += min(1.0, max(-1.0, matrix[i][j] / size)) if size else 0.0
    mean /= num_models * (num_models - 1) / 2
    divisor = 1.0 + (num_models - 1) * mean
    return 0.0 if divisor < _POLE else num_models * mean / divisor


def interpolation_ratios(inner: torch.Tensor, num_models: int) -> torch.Tensor:
    """``t`` from inner products of task vectors.

    Args:
        inner: float64 inner products of pairs ``i <= j``, row by row of the upper triangle, along the first dimension.
        num_models: ``N``.
    """
    import torch  # noqa: PLC0415

    place: dict[tuple[int, int], int] = {}
    for i in range(num_models):
        for j in range(i, num_models):
            place[i, j] = len(place)
    lengths = [inner[place[i, i]].sqrt() for i in range(num_models)]
    mean = torch.zeros_like(inner[0])
    for i, j in place:
        if i < j:
            sizes = lengths[i] * lengths[j]
            mean += torch.where(sizes == 0, 0.0, inner[place[i, j]] / sizes).clamp_(-1.0, 1.0)
    mean /= num_models * (num_models - 1) / 2
    divisor = 1.0 + (num_models - 1) * mean
    return torch.where(divisor < _POLE, 0.0, num_models * mean / divisor)

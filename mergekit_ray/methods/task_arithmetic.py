"""Weighted sum of task vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from mergekit_ray.core.declaration import BaseUse
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared.accumulate import NormalizedMethod, divisor, rounded_sum_, single_divisor
from mergekit_ray.methods.shared.combinations import Sum
from mergekit_ray.methods.shared.protocol import Chunk, Operands, SummedTensor, SumMethod
from mergekit_ray.methods.shared.task_vectors import ScaledParameters, WeightedParameters, task_vectors

if TYPE_CHECKING:
    import torch


class TaskArithmeticParameters(ScaledParameters):
    """Global parameters of `TaskArithmetic`."""

    normalize: bool = Field(False, description="divide by the sum of the weights")


@METHODS.register("task_arithmetic")
class TaskArithmetic(NormalizedMethod, SumMethod):
    """``b + λ Σ w_i δ_i``, over ``Σ w_i`` if normalised (Ilharco et al. 2023).

    The task vectors are summed by themselves and added to the base last: where no model differs from the base the
    result is the base, bit for bit, and elsewhere rounding is in proportion to the change, not to the weight.
    """

    name = "task_arithmetic"
    summary = "Base plus a weighted sum of task vectors."
    formula = "b + λ·Σ w_i·(x_i - b), divided by Σ w_i if normalize"
    reference = "https://arxiv.org/abs/2212.04089"
    base = BaseUse.REQUIRED
    model_parameters = WeightedParameters
    global_parameters = TaskArithmeticParameters
    propagates_non_finite = True

    @classmethod
    def sum_of(cls, tensor: SummedTensor) -> Sum:
        """See `SumMethod.sum_of`."""
        settings = tensor.parameters
        weights = [each.weight for each in tensor.input_parameters]
        divisor = single_divisor(weights) if settings.normalize else 1.0
        return Sum(weights, divisor, settings.lambda_, rounds_products=True)

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`.

        Raises:
            MergeError: the weights sum to zero and are to be normalised.
        """
        del statistics
        settings = operands.parameters
        weights = [parameters.weight for parameters in operands.input_parameters]
        total = divisor(weights, operands.compute_dtype, normalize=settings.normalize)
        base, deltas = task_vectors(chunk)
        return base.add_(rounded_sum_(deltas, weights, divisor=total, scale=settings.lambda_, scratch=chunk.scratch))

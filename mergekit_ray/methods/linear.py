"""Weighted average."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from mergekit_ray.core.declaration import Parameters
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared.accumulate import NormalizedMethod, divide_, divisor, single_divisor, weighted_sum_
from mergekit_ray.methods.shared.combinations import Sum
from mergekit_ray.methods.shared.protocol import Chunk, Operands, SummedTensor, SumMethod

if TYPE_CHECKING:
    import torch


class LinearModelParameters(Parameters):
    """Per-model parameters of `Linear`."""

    weight: float = Field(description="weight of the model in the sum", allow_inf_nan=False)


class LinearParameters(Parameters):
    """Global parameters of `Linear`."""

    normalize: bool = Field(True, description="divide by the sum of the weights")


@METHODS.register("linear")
class Linear(NormalizedMethod, SumMethod):
    """``Σ w_i x_i``, over ``Σ w_i`` if normalised (Wortsman et al. 2022, "Model soups").

    The weights are added up in compute dtype. With ``n`` models the result is, before it is rounded to the
    output dtype, within ``(2n + 1) · u · Σ|w_i x_i| / |Σ w_i|`` of the exact one, ``u`` being half the compute dtype's
    machine epsilon (2^-24 in float32): far below an ulp of a 16-bit output.
    """

    name = "linear"
    summary = "Weighted average of the models."
    formula = "Σ w_i·x_i, divided by Σ w_i if normalize"
    reference = "https://arxiv.org/abs/2203.05482"
    model_parameters = LinearModelParameters
    global_parameters = LinearParameters
    propagates_non_finite = True
    widens = True

    @classmethod
    def sum_of(cls, tensor: SummedTensor) -> Sum:
        """See `SumMethod.sum_of`."""
        weights = [each.weight for each in tensor.input_parameters]
        return Sum(weights, single_divisor(weights) if tensor.parameters.normalize else 1.0)

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`.

        Raises:
            MergeError: the weights sum to zero and are to be normalised.
        """
        del statistics
        weights = [parameters.weight for parameters in operands.input_parameters]
        total = divisor(weights, operands.compute_dtype, normalize=operands.parameters.normalize)
        merged = weighted_sum_(chunk.inputs, weights)
        return merged if total == 1.0 else divide_(merged, total)

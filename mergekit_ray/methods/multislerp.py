"""Weighted mean of directions on the sphere, for any number of models."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mergekit_ray.core.declaration import BaseUse, Parameters
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared.accumulate import coefficients
from mergekit_ray.methods.shared.combinations import Sum
from mergekit_ray.methods.shared.gram import (
    Matrix,
    as_matrix,
    coefficients_by,
    length,
    norms,
    span_coefficients,
    sum_of_vectors,
)
from mergekit_ray.methods.shared.protocol import Chunk, Operands, ReduceMethod, SummedTensor, SumMethod

if TYPE_CHECKING:
    import torch

_CANCELLED = 1e-7
"""Weighted unit vectors whose sum is below this part of their lengths cancel: what is left is the inputs' rounding."""


class MultislerpModelParameters(Parameters):
    """Per-model parameters of `Multislerp`."""

    weight: float = Field(description="weight of the model's direction and norm", allow_inf_nan=False)


class MultislerpParameters(Parameters):
    """Global parameters of `Multislerp`."""

    normalize_weights: bool = Field(True, description="divide the weights by their sum")
    eps: float = Field(
        1e-8,
        description="added to norms before dividing by them; sums of directions no longer than this have cancelled",
        ge=0.0,
        allow_inf_nan=False,
    )


@METHODS.register("multislerp")
class Multislerp(SumMethod, ReduceMethod):
    """Normalised weighted mean of the models' unit vectors, times the weighted mean of their norms.

    With ``u_i = x_i/(‖x_i‖ + ε)``, ``m = Σ w_i u_i`` and ``μ = m/‖m‖`` the method takes one step of the exponential map
    from ``μ`` along ``τ = Σ w_i (u_i − (u_i·μ) μ)``. But ``τ = m − (m·μ) μ = 0``, whatever the models: the step has
    length 0 (``ε``, as mergekit counts it) and the result is ``cos(ε) · Σ w_i ‖x_i‖ · μ``.

    With a base all this is done on task vectors and added to the base. One model is taken as it is, whatever its
    weight. Where the directions cancel (``‖m‖ <= ε``, or rounding), two models are interpolated linearly:
    ``Σ w_i x_i``. Tensors that are all zero, or have weight 0, give zero.
    """

    name = "multislerp"
    summary = "Weighted mean of directions on the sphere times the weighted mean of norms, for any number of models."
    formula = "Σ w_i·‖x_i‖ · m/‖m‖, m = Σ w_i·x_i/(‖x_i‖+eps), w_i divided by Σ w_i if normalize_weights"
    base = BaseUse.OPTIONAL
    model_parameters = MultislerpModelParameters
    global_parameters = MultislerpParameters
    propagates_non_finite = True

    @classmethod
    def check_together(cls, parameters: Mapping[str, Any], input_parameters: Sequence[Mapping[str, Any]]) -> None:
        """See `MethodDeclaration.check_together`."""
        _weights([each["weight"] for each in input_parameters], normalize=parameters["normalize_weights"])

    @classmethod
    def sum_of(cls, tensor: SummedTensor) -> Sum:
        """See `SumMethod.sum_of`."""
        rule = _rule(tensor.parameters, tensor.input_parameters)
        if rule is None:
            return Sum([1.0])
        return Sum(coefficients_by(rule, as_matrix(tensor.inner_products(), len(tensor.input_parameters))))

    def statistics(self, operands: Operands) -> list[float]:
        """Coefficients of the models, or of their task vectors.

        Raises:
            MergeError: the weights sum to zero and are to be normalised, or the directions of three or more cancel.
        """
        rule = _rule(operands.parameters, operands.input_parameters)
        return [1.0] if rule is None else span_coefficients(operands, rule)

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`; ``statistics`` are the coefficients."""
        del operands
        return sum_of_vectors(chunk, statistics)


def _rule(settings: Any, input_parameters: Sequence[Any]) -> Callable[[Matrix], list[float]] | None:
    """What makes coefficients of a Gram matrix; None for one model, which is taken as it is."""
    if len(input_parameters) == 1:
        return None
    weights = _weights([each.weight for each in input_parameters], normalize=settings.normalize_weights)
    return lambda matrix: directional_mean(matrix, weights, settings.eps)


def directional_mean(matrix: Matrix, weights: Sequence[float], eps: float) -> list[float]:
    """Coefficients of the mean of vectors with the Gram matrix ``matrix``.

    Raises:
        MergeError: the weighted directions of three vectors or more cancel.
    """
    sizes = norms(matrix)
    directions = [weight / (size + eps) if size else 0.0 for weight, size in zip(weights, sizes, strict=True)]
    mean_length = length(directions, matrix)
    terms = math.fsum(abs(direction) * size for direction, size in zip(directions, sizes, strict=True))
    if mean_length <= max(eps, _CANCELLED) * terms:  # lengths below eps make all directions short
        if len(weights) == 2 or terms == 0.0:
            return list(weights)
        raise MergeError(
            f"the weights {list(weights)} make the directions of the models cancel, which leaves none to merge along",
            remedy="change the models' `weight`, or leave out a model that is the opposite of others",
        )
    scale = math.fsum(weight * size for weight, size in zip(weights, sizes, strict=True))
    return [math.cos(eps) * scale * direction / mean_length for direction in directions]


def _weights(weights: Sequence[float], *, normalize: bool) -> list[float]:
    """Those that count; a single model's does not."""
    return coefficients(weights, normalize=normalize and len(weights) > 1, switch="normalize_weights")

"""Geometric median: the point whose distances to all models sum to the least."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mergekit_ray.core.declaration import Parameters
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared.accumulate import add_scaled_
from mergekit_ray.methods.shared.protocol import Chunk, Operands, ReduceMethod
from mergekit_ray.methods.shared.sums import partial_sums, total

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = np.ndarray[Any, np.dtype[np.float64]]

COINCIDENT = 64 * sys.float_info.epsilon
"""A squared distance below this part of the terms that cancel in it is rounding: the points are one."""

OPTIMAL_MARGIN = 1e-9
"""How clearly a model must be the median by itself; on the border (two models) it need not be the only one."""


class GeometricMedianModelParameters(Parameters):
    """Per-model parameters of `GeometricMedian`."""

    weight: float = Field(1.0, description="weight of the distance to the model", ge=0.0, allow_inf_nan=False)


class GeometricMedianParameters(Parameters):
    """Global parameters of `GeometricMedian`."""

    max_iterations: int = Field(1000, description="most iterations of Weiszfeld's algorithm", ge=0)
    tolerance: float = Field(
        1e-10,
        description="stop when a step is shorter than this part of the (harmonic mean) distance to the models",
        ge=0.0,
        allow_inf_nan=False,
    )


@METHODS.register("geometric_median")
class GeometricMedian(ReduceMethod):
    """``argmin_y Σ w_i ‖x_i − y‖``, each tensor as one flat vector.

    Weiszfeld 1937 with the step of Vardi & Zhang 2000 where an iterate meets a model. All iterates from the weighted
    mean on are convex combinations ``y = Σ a_i x_i``, so one pass takes the distances between the models (in float64),
    and the iteration is one on the coefficients. Unlike a mean, it moves boundedly however far a minority of the models
    is off.

    A model that is the median by itself (``‖Σ_j w_j (x_j − x_i)/‖x_j − x_i‖‖ < w_i``: one that outweighs the others, or
    lies amid them) is found beforehand and returned bit for bit, as are models all equal. Where the median is not
    unique (two models of one weight; an even number on a line) it is the point that the iteration reaches from the
    mean: for two models of one weight, the mean. Convergence is linear; after ``max_iterations`` the point reached is
    taken. Models of weight 0 do not count.
    """

    name = "geometric_median"
    summary = "Point with the least weighted sum of distances to the models: robust against outliers."
    formula = "argmin_y Σ w_i·‖x_i − y‖ over each tensor as a vector, by Weiszfeld's iteration from the mean"
    reference = "https://doi.org/10.1073/pnas.97.4.1423"
    model_parameters = GeometricMedianModelParameters
    global_parameters = GeometricMedianParameters
    propagates_non_finite = True

    @classmethod
    def check_together(cls, parameters: Mapping[str, Any], input_parameters: Sequence[Mapping[str, Any]]) -> None:
        """See `MethodDeclaration.check_together`."""
        del parameters
        _check([each["weight"] for each in input_parameters])

    def statistics(self, operands: Operands) -> list[float]:
        """The coefficients of the models.

        Raises:
            MergeError: all weights are zero.
        """
        weights = [parameters.weight for parameters in operands.input_parameters]
        _check(weights)
        settings: GeometricMedianParameters = operands.parameters
        return coefficients_of_median(
            squared_distances(operands), weights, max_iterations=settings.max_iterations, tolerance=settings.tolerance
        )

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`; ``statistics`` are the coefficients.

        The sum is taken from the model with the largest one, ``x_p + Σ a_i (x_i − x_p)``, so that equal models, and a
        model that is the median, come out as they are.
        """
        del operands
        found: list[float] = statistics
        pivot = found.index(max(found))
        center = chunk.inputs[pivot]
        merged = chunk.scratch.like(center).copy_(center)
        for index, (x, coefficient) in enumerate(zip(chunk.inputs, found, strict=True)):
            if index != pivot:
                add_scaled_(merged, x.sub_(center), coefficient)
        return merged


def _check(weights: Sequence[float]) -> None:
    if not any(weights):
        raise MergeError("all weights are 0: every point is a median", remedy="give a model a weight above 0")


def squared_distances(operands: Operands) -> list[list[float]]:
    """``‖x_i − x_j‖²`` over the whole tensor, from differences formed in float64.

    Not from inner products of the models: they are far closer to each other than to zero.
    """
    import torch  # noqa: PLC0415 - declarations are read without torch

    num_inputs = operands.num_inputs
    pairs = [(i, j) for i in range(num_inputs) for j in range(i + 1, num_inputs)]

    def squares(chunk: Chunk) -> list[torch.Tensor]:
        first = chunk.inputs[0]
        difference = chunk.scratch.like(first, torch.float64)
        wide = [chunk.scratch.like(first, torch.float64).copy_(x) for x in chunk.inputs]
        return [partial_sums(torch.sub(wide[i], wide[j], out=difference).square_(), difference) for i, j in pairs]

    blocks = operands.map_blocks(squares)
    found = [[0.0] * num_inputs for _ in range(num_inputs)]
    for place, (i, j) in enumerate(pairs):
        found[i][j] = found[j][i] = total([block[place] for block in blocks])
    return found


def coefficients_of_median(
    distances: Sequence[Sequence[float]], weights: Sequence[float], *, max_iterations: int, tolerance: float
) -> list[float]:
    """``a`` with ``Σ a_i x_i`` the median, ``Σ a_i = 1``, ``a_i >= 0``.

    Args:
        distances: squared distances between the points. If one is not finite, the coefficients are the weights'.
        weights: not all zero.
        max_iterations: of Weiszfeld's algorithm.
        tolerance: of the length of a step, as part of the harmonic mean of the distances to the points.
    """
    import numpy as np  # noqa: PLC0415 - imported where it works, as torch is

    squared = np.array(distances, dtype=np.float64)
    weight = np.array(weights, dtype=np.float64)
    weight /= weight.max()
    found: Array = weight / weight.sum()
    if np.isfinite(squared).all() and squared[np.ix_(weight > 0, weight > 0)].any():
        winner = _dominant(squared, weight)
        if winner is not None:
            return [float(index == winner) for index in range(len(weights))]
        for _ in range(max_iterations):
            step, length = _weiszfeld(squared, weight, found)
            found = found + step
            if length <= tolerance:
                break
    return [float(a) for a in found]


def _dominant(squared: Array, weight: Array) -> int | None:
    """The point that is the only median, if one is: where the pull of the others is less than its own weight."""
    import numpy as np  # noqa: PLC0415

    for index in np.flatnonzero(weight):
        is_apart = squared[index] > 0
        pull = np.where(is_apart, weight, 0.0) / np.sqrt(np.where(is_apart, squared[index], 1.0))
        pull[index] -= pull.sum()
        if _norm(pull, squared) < float(weight[~is_apart].sum()) * (1 - OPTIMAL_MARGIN):
            return int(index)
    return None


def _weiszfeld(squared: Array, weight: Array, found: Array) -> tuple[Array, float]:
    """The step to the next iterate, in coefficients, and its length over the harmonic mean of the distances."""
    import numpy as np  # noqa: PLC0415

    products = squared @ found
    own = float(found @ products) / 2
    to_points = products - own
    is_apart = to_points > COINCIDENT * (products + own)
    rates = np.where(is_apart, weight, 0.0) / np.sqrt(np.where(is_apart, to_points, 1.0))
    step: Array = rates / rates.sum() - found
    held = float(weight[~is_apart].sum())
    # The pull of the other points, ‖Σ w_i (x_i − y)/‖x_i − y‖‖; at a point it must overcome the point's own weight.
    pull = float(rates.sum()) * _norm(step, squared)
    if held > 0:
        step *= max(0.0, 1.0 - held / pull) if pull > 0 else 0.0
    return step, pull / float(weight.sum())


def _norm(coefficients: Array, squared: Array) -> float:
    """``‖Σ c_i x_i‖`` for ``Σ c_i = 0``, from squared distances: ``√(−cᵀDc / 2)``."""
    return math.sqrt(max(float(-coefficients @ squared @ coefficients) / 2, 0.0))

"""Riemannian (Karcher) mean of the models' directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mergekit_ray.core.declaration import Parameters
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared.combinations import Sum
from mergekit_ray.methods.shared.gram import (
    Matrix,
    as_matrix,
    coefficients_by,
    inner,
    length,
    norms,
    span_coefficients,
    sum_of_vectors,
)
from mergekit_ray.methods.shared.protocol import Chunk, Operands, ReduceMethod, SummedTensor, SumMethod

if TYPE_CHECKING:
    import torch

_NO_DIRECTION = 1e-7
"""A mean of unit vectors this short is rounding; a unit vector this near the opposite pole is in all directions."""


class KarcherParameters(Parameters):
    """Global parameters of `Karcher`."""

    max_iter: int = Field(10, description="steps at most", ge=0)
    tol: float = Field(
        1e-5,
        description="a step shorter than this (in radians) ends the iteration; vectors shorter than this have no "
        "direction",
        ge=0.0,
        allow_inf_nan=False,
    )


@METHODS.register("karcher")
class Karcher(SumMethod, ReduceMethod):
    """The point of the sphere with the least sum of squared arcs to the models' unit vectors, times their mean norm.

    Each tensor is one flat vector ``x_i = n_i u_i``. From ``μ``, the normalised mean of the ``u_i``, steps along
    ``τ = (1/N) Σ (θ_i/sin θ_i) (u_i − cos θ_i μ)`` with ``cos θ_i = u_i·μ``, ``μ ← cos‖τ‖ μ + sin‖τ‖ τ/‖τ‖``, until
    ``‖τ‖ < tol`` or ``max_iter`` steps are done (Karcher 1977). All ``μ`` lie in the span of the models, so the tensors
    are gone through once: what is iterated are ``N`` coefficients in double precision.

    A model whose norm is not above ``tol`` has no direction and is left out of ``τ`` and its ``N``, but counts in the
    mean norm. Directions that cancel start from the first one; an exact opposite of ``μ`` pulls in no direction and is
    left out of that step. Without any direction the result is zero.
    """

    name = "karcher"
    summary = "Riemannian mean of the models' directions on the sphere, times their mean norm."
    formula = "mean ‖x_i‖ · argmin_μ Σ arccos²(μ·x_i/‖x_i‖), by max_iter steps of the exponential map"
    reference = "https://arxiv.org/abs/2603.04972"
    global_parameters = KarcherParameters
    propagates_non_finite = True

    @classmethod
    def sum_of(cls, tensor: SummedTensor) -> Sum:
        """See `SumMethod.sum_of`."""
        settings, matrix = tensor.parameters, as_matrix(tensor.inner_products(), len(tensor.input_parameters))
        return Sum(coefficients_by(lambda found: mean_direction(found, settings.max_iter, settings.tol), matrix))

    def statistics(self, operands: Operands) -> list[float]:
        """Coefficients of the models."""
        settings = operands.parameters
        return span_coefficients(operands, lambda matrix: mean_direction(matrix, settings.max_iter, settings.tol))

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`; ``statistics`` are the coefficients."""
        del operands
        return sum_of_vectors(chunk, statistics)


def mean_direction(matrix: Matrix, max_iter: int, tol: float) -> list[float]:
    """Coefficients of the Karcher mean of vectors with the Gram matrix ``matrix``."""
    sizes = norms(matrix)
    chosen = [index for index, size in enumerate(sizes) if size > tol]
    if not chosen:
        return [0.0] * len(sizes)
    cosines = [[matrix[i][j] / (sizes[i] * sizes[j]) for j in chosen] for i in chosen]
    mean = _iterate(cosines, max_iter, tol)
    mean_size = math.fsum(sizes) / len(sizes)
    found = [0.0] * len(sizes)
    for index, coefficient in zip(chosen, mean, strict=True):
        found[index] = coefficient * mean_size / sizes[index]
    return found


def _iterate(cosines: Matrix, max_iter: int, tol: float) -> list[float]:
    """The mean of unit vectors as coefficients of them."""
    count = len(cosines)
    mean = _unit([1.0 / count] * count, cosines)
    for _ in range(max_iter):
        step = _step(mean, cosines)
        angle = length(step, cosines)
        if angle < tol or angle == 0.0:
            break
        pull = math.sin(angle) / angle
        mean = _unit([math.cos(angle) * m + pull * s for m, s in zip(mean, step, strict=True)], cosines)
    return mean


def _step(mean: Sequence[float], cosines: Matrix) -> list[float]:
    """``τ``, the mean of the logarithms of the unit vectors at ``mean``."""
    count = len(cosines)
    step = [0.0] * count
    along = 0.0
    for index in range(count):
        unit = [float(place == index) for place in range(count)]
        cosine = min(1.0, max(-1.0, inner(unit, cosines, mean)))
        sine = math.sqrt(1.0 - cosine * cosine)
        at_pole = 1.0 if cosine > 0.0 else 0.0
        stretch = math.acos(cosine) / sine if sine > _NO_DIRECTION else at_pole
        step[index] = stretch / count
        along += stretch * cosine / count
    return [s - along * m for s, m in zip(step, mean, strict=True)]


def _unit(coefficients: Sequence[float], cosines: Matrix) -> list[float]:
    """Scaled to a vector of length 1; the first of the unit vectors if its length is negligible."""
    size = length(coefficients, cosines)
    if size <= _NO_DIRECTION:
        return [1.0, *[0.0] * (len(coefficients) - 1)]
    return [coefficient / size for coefficient in coefficients]

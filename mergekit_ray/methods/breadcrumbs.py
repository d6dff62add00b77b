"""Model Breadcrumbs: drop the largest changes and the smallest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mergekit_ray.core.declaration import BaseUse
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared.accumulate import NormalizedMethod, coefficients, weighted_sum_
from mergekit_ray.methods.shared.order_statistics import collected_bytes
from mergekit_ray.methods.shared.protocol import Chunk, Operands, ReduceMethod
from mergekit_ray.methods.shared.rescaling import rescaling_factors
from mergekit_ray.methods.shared.selection import Band, select_next_largest
from mergekit_ray.methods.shared.sign import add_elected_
from mergekit_ray.methods.shared.task_vectors import ScaledParameters, TrimmedParameters, task_vector, task_vectors

if TYPE_CHECKING:
    import torch


class BreadcrumbsModelParameters(TrimmedParameters):
    """Per-model parameters of `Breadcrumbs` and `BreadcrumbsTies`."""

    gamma: float = Field(0.01, description="part of the task vector dropped as too large", ge=0.0, le=1.0)


class BreadcrumbsParameters(ScaledParameters):
    """Global parameters of `Breadcrumbs` and `BreadcrumbsTies`."""

    normalize: bool = Field(
        False, description="divide by the sum of the weights (breadcrumbs_ties: of those that agree)"
    )
    rescale: bool = Field(False, description="scale what is kept to the task vector's L1 norm")


@dataclass(frozen=True, slots=True)
class Crumbs:
    """What the passes over the whole tensor found.

    Attributes:
        bands: what is kept of each model's task vector.
        factors: rescaling of each model.
    """

    bands: Sequence[Band]
    factors: Sequence[float]


class _Breadcrumbs(ReduceMethod):
    """Trim of outliers: ``k = ⌊density·n⌋`` changes are kept (Davari and Belilovsky 2023).

    The ``min(⌊gamma·n⌋, n − k)`` of largest magnitude are dropped, then the smallest until k are left: where gamma is
    more than ``1 − density``, only as many large ones go as keep the density. Of equal magnitudes the lowest flat index
    counts as the largest, at both ends. With ``rescale`` what is kept is scaled by ``‖δ‖₁ / ‖δ̃‖₁``, as in DARE; where
    either norm is below 1e-7 it stays as it is.
    """

    reference = "https://arxiv.org/abs/2312.06795"
    base = BaseUse.REQUIRED
    model_parameters = BreadcrumbsModelParameters
    global_parameters = BreadcrumbsParameters

    @classmethod
    def working_bytes(cls, shape: tuple[int, ...], num_models: int, itemsize: int) -> int:
        """See `MethodDeclaration.working_bytes`."""
        return collected_bytes(math.prod(shape), 2 * num_models, itemsize)

    def statistics(self, operands: Operands) -> Crumbs:
        """What is kept of each model's task vector, and how it is rescaled."""
        num_elements = operands.num_elements
        counts = [math.floor(parameters.density * num_elements) for parameters in operands.input_parameters]
        dropped = [
            min(math.floor(parameters.gamma * num_elements), num_elements - count)
            for parameters, count in zip(operands.input_parameters, counts, strict=True)
        ]
        bands = select_next_largest(operands, dropped, counts, task_vector)
        factors = [1.0] * operands.num_inputs
        if operands.parameters.rescale:
            factors = rescaling_factors(operands, lambda delta, index, start: bands[index].trim_(delta, start))
        return Crumbs(bands, factors)


def _trimmed(chunk: Chunk, crumbs: Crumbs) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """The base's run and the trimmed task vectors, not rescaled."""
    base, deltas = task_vectors(chunk)
    for delta, band in zip(deltas, crumbs.bands, strict=True):
        band.trim_(delta, chunk.start)
    return base, deltas


@METHODS.register("breadcrumbs")
class Breadcrumbs(NormalizedMethod, _Breadcrumbs):
    """``b + λ Σ w_i δ̃_i``, ``δ̃`` a task vector without its largest and smallest elements."""

    name = "breadcrumbs"
    summary = "Drop the largest and the smallest changes, weighted sum."
    formula = (
        "b + λ·Σ w_i·δ̃_i, divided by Σ w_i if normalize; δ̃ the ⌊density·n⌋ largest |δ| after the ⌊gamma·n⌋ largest"
    )

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`; ``statistics`` is the `Crumbs`.

        Raises:
            MergeError: the weights sum to zero and are to be normalised.
        """
        crumbs: Crumbs = statistics
        settings = operands.parameters
        weights = [parameters.weight for parameters in operands.input_parameters]
        factors = coefficients(weights, normalize=settings.normalize, scale=settings.lambda_)
        base, deltas = _trimmed(chunk, crumbs)
        return base.add_(weighted_sum_(deltas, [f * r for f, r in zip(factors, crumbs.factors, strict=True)]))


@METHODS.register("breadcrumbs_ties")
class BreadcrumbsTies(_Breadcrumbs):
    """As `Breadcrumbs`, the sum taken by sign election (see `mergekit_ray.methods.shared.sign`)."""

    name = "breadcrumbs_ties"
    summary = "Drop the largest and the smallest changes, elect a sign per element, merge what agrees."
    formula = "b + λ·Σ m_i·w_i·δ̃_i, over Σ m_i·w_i if normalize; m_i = [sign(w_i·δ̃_i) = elected sign]; δ̃ as breadcrumbs"

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`; ``statistics`` is the `Crumbs`."""
        crumbs: Crumbs = statistics
        settings = operands.parameters
        weights = [parameters.weight for parameters in operands.input_parameters]
        base, deltas = _trimmed(chunk, crumbs)
        return add_elected_(
            base,
            deltas,
            weights,
            factors=[w * r for w, r in zip(weights, crumbs.factors, strict=True)],
            normalize=settings.normalize,
            scale=settings.lambda_,
            scratch=chunk.scratch,
        )

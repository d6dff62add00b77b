"""DELLA: drop changes at random, small ones rather than large ones, and rescale what is left."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mergekit_ray.core.declaration import BaseUse
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared.accumulate import NormalizedMethod, coefficients, weighted_sum_
from mergekit_ray.methods.shared.packed_mask import PackedMask, mask_bytes
from mergekit_ray.methods.shared.protocol import Chunk, Operands, ReduceMethod
from mergekit_ray.methods.shared.rank_sampling import (
    MagnitudeSampling,
    Sampled,
    check_probabilities,
    row_length,
    run_elements,
)
from mergekit_ray.methods.shared.rescaling import rescaling_factor
from mergekit_ray.methods.shared.sign import add_elected_
from mergekit_ray.methods.shared.task_vectors import ScaledParameters, TrimmedParameters, task_vector, task_vectors

if TYPE_CHECKING:
    import torch


class DellaModelParameters(TrimmedParameters):
    """Per-model parameters of `Della` and `DellaLinear`."""

    epsilon: float = Field(
        0.15, description="the smallest change of a row is kept with density - epsilon, the largest + epsilon", ge=0.0
    )

    @classmethod
    def check_together(cls, values: Mapping[str, Any]) -> None:
        """``density ± epsilon`` must be probabilities, unless the density is 0 or 1."""
        check_probabilities(values["density"], values["epsilon"])


class DellaParameters(ScaledParameters):
    """Global parameters of `Della`."""

    normalize: bool = Field(True, description="divide by the weights of the models that agree with the elected sign")
    rescale: bool = Field(True, description="scale what is kept to the task vector's L1 norm")


class DellaLinearParameters(DellaParameters):
    """Global parameters of `DellaLinear`."""

    normalize: bool = Field(False, description="divide by the sum of the weights")


@dataclass(frozen=True, slots=True)
class Samples:
    """What the pass over the whole tensor found.

    Attributes:
        masks: by model, what is kept of its task vector; without those that keep all or nothing.
        factors: rescaling of each model.
    """

    masks: Mapping[int, PackedMask]
    factors: Sequence[float]


class _Della(ReduceMethod):
    """Magnitude sampling of task vectors (see `mergekit_ray.methods.shared.rank_sampling`).

    With ``rescale`` what is kept is scaled by ``‖δ‖₁ / ‖δ̃‖₁``, as in DARE; where either norm is below 1e-7 it stays as
    it is.
    """

    reference = "https://arxiv.org/abs/2406.11617"
    base = BaseUse.REQUIRED
    model_parameters = DellaModelParameters

    @classmethod
    def working_bytes(cls, shape: tuple[int, ...], num_models: int, itemsize: int) -> int:
        """See `MethodDeclaration.working_bytes`."""
        del itemsize
        return 2 * num_models * mask_bytes(math.prod(shape))  # in runs, and joined

    def statistics(self, operands: Operands) -> Samples:
        """Masks and rescaling of the models."""
        samplings = {
            index: sampling
            for index, sampling in enumerate(
                MagnitudeSampling(key, parameters.density, parameters.epsilon)
                for key, parameters in zip(operands.keys, operands.input_parameters, strict=True)
            )
            if sampling.is_random
        }
        factors = [1.0] * operands.num_inputs
        if not samplings or not operands.num_elements:
            return Samples({}, factors)
        length = row_length(operands.shape)

        def sample(chunk: Chunk) -> dict[int, Sampled]:
            return {
                index: sampling.sample(task_vector(chunk, index), chunk.start, length, chunk.scratch)
                for index, sampling in samplings.items()
            }

        runs = operands.map_blocks(sample, run_elements(length, operands.block_elements))
        if operands.parameters.rescale:
            for index in samplings:
                factors[index] = rescaling_factor((run[index].whole for run in runs), (run[index].kept for run in runs))
        return Samples({index: PackedMask.join(run[index].mask for run in runs) for index in samplings}, factors)


def _trimmed(chunk: Chunk, operands: Operands, samples: Samples) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """The base's run and the trimmed task vectors, not rescaled."""
    base, deltas = task_vectors(chunk)
    for index, delta in enumerate(deltas):
        if index in samples.masks:
            samples.masks[index].trim_(delta, chunk.start)
        elif operands.input_parameters[index].density <= 0.0:
            delta.zero_()
    return base, deltas


@METHODS.register("della")
class Della(_Della):
    """As `DellaLinear`, the sum taken by sign election (see `mergekit_ray.methods.shared.sign`)."""

    name = "della"
    summary = "Drop changes at random, small ones rather than large ones, rescale, elect a sign, merge what agrees."
    formula = (
        "b + λ·Σ m_i·w_i·δ̃_i, over Σ m_i·w_i if normalize; m_i = [sign(w_i·δ̃_i) = elected sign]; δ̃ as della_linear"
    )
    global_parameters = DellaParameters

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`; ``statistics`` are the `Samples`."""
        samples: Samples = statistics
        settings = operands.parameters
        weights = [parameters.weight for parameters in operands.input_parameters]
        base, deltas = _trimmed(chunk, operands, samples)
        return add_elected_(
            base,
            deltas,
            weights,
            factors=[w * r for w, r in zip(weights, samples.factors, strict=True)],
            normalize=settings.normalize,
            scale=settings.lambda_,
            scratch=chunk.scratch,
        )


@METHODS.register("della_linear")
class DellaLinear(NormalizedMethod, _Della):
    """``b + λ Σ w_i δ̃_i``, ``δ̃`` a task vector sampled by magnitude and rescaled."""

    name = "della_linear"
    summary = "Drop changes at random, small ones rather than large ones, rescale, weighted sum."
    formula = (
        "b + λ·Σ w_i·δ̃_i, divided by Σ w_i if normalize; δ̃ keeps rank r of n in a row with probability"
        " density - epsilon + 2·epsilon·r/(n - 1)"
    )
    global_parameters = DellaLinearParameters

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`; ``statistics`` are the `Samples`.

        Raises:
            MergeError: the weights sum to zero and are to be normalised.
        """
        samples: Samples = statistics
        settings = operands.parameters
        weights = [parameters.weight for parameters in operands.input_parameters]
        factors = coefficients(weights, normalize=settings.normalize, scale=settings.lambda_)
        base, deltas = _trimmed(chunk, operands, samples)
        return base.add_(weighted_sum_(deltas, [f * r for f, r in zip(factors, samples.factors, strict=True)]))

"""DARE: drop changes at random and rescale what is left."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mergekit_ray.core.declaration import Access, BaseUse
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared.accumulate import NormalizedMethod, divisor, rounded_sum_, single_divisor
from mergekit_ray.methods.shared.combinations import Elected, Kept, Sum
from mergekit_ray.methods.shared.protocol import Chunk, Operands, ReduceMethod, SummedTensor, SumMethod
from mergekit_ray.methods.shared.random_mask import MaskSpace, RandomMask
from mergekit_ray.methods.shared.rescaling import NEGLIGIBLE_NORM
from mergekit_ray.methods.shared.sign import add_elected_
from mergekit_ray.methods.shared.sums import total
from mergekit_ray.methods.shared.task_vectors import ScaledParameters, TrimmedParameters, task_vector, task_vectors

if TYPE_CHECKING:
    import torch


class DareParameters(ScaledParameters):
    """Global parameters of `DareLinear` and `DareTies`."""

    normalize: bool = Field(False, description="divide by the sum of the weights (dare_ties: of those that agree)")
    rescale: bool = Field(True, description="scale what is kept to the task vector's L1 norm")


class _Dare(SumMethod, ReduceMethod):
    """Random trim of task vectors: each element is kept with probability ``density`` (Yu et al. 2024)."""

    reference = "https://arxiv.org/abs/2311.03099"
    masks = True
    base = BaseUse.REQUIRED
    model_parameters = TrimmedParameters
    global_parameters = DareParameters

    @classmethod
    def effective_access(cls, parameters: dict[str, Any]) -> Access:
        """Without rescaling any run of elements alone will do."""
        rescale = cls.global_parameters.model_validate(parameters).model_dump()["rescale"]
        return Access.REDUCE if rescale else Access.ELEMENTWISE

    @classmethod
    def sum_of(cls, tensor: SummedTensor) -> Kept:
        """See `SumMethod.sum_of`."""
        masks = _masks(tensor)
        norms = tensor.masked_norms(masks) if _rescaled(masks, tensor.parameters) else []
        weights = [each.weight for each in tensor.input_parameters]
        factors = [w * r for w, r in zip(weights, _factors(dict(enumerate(norms)), len(masks)), strict=True)]
        return Kept(masks, cls._sum_of_kept(factors, weights, tensor.parameters))

    @classmethod
    @abstractmethod
    def _sum_of_kept(
        cls, factors: Sequence[float], weights: Sequence[float], settings: DareParameters
    ) -> Sum | Elected:
        """What is made of what is kept."""

    def statistics(self, operands: Operands) -> list[float]:
        """What is kept is scaled by ``‖δ‖₁ / ‖δ̃‖₁``, 1 where either is below `NEGLIGIBLE_NORM`: a factor per model."""
        masks = _masks(operands)
        trimmed = _rescaled(masks, operands.parameters)
        if not trimmed:
            return _factors({}, operands.num_inputs)

        def measure(chunk: Chunk) -> list[tuple[torch.Tensor, torch.Tensor]]:
            space = MaskSpace.like(chunk.inputs[0], chunk.scratch)
            return [masks[index].l1_sums(task_vector(chunk, index), chunk.start, space) for index in trimmed]

        blocks = operands.map_blocks(measure)
        norms = {
            index: (total(block[place][0] for block in blocks), total(block[place][1] for block in blocks))
            for place, index in enumerate(trimmed)
        }
        return _factors(norms, operands.num_inputs)


def _masks(operands: Operands | SummedTensor) -> list[RandomMask]:
    return [
        RandomMask(key, parameters.density)
        for key, parameters in zip(operands.keys, operands.input_parameters, strict=True)
    ]


def _rescaled(masks: Sequence[RandomMask], settings: DareParameters) -> list[int]:
    """Which models have something dropped and something left, to be rescaled."""
    return [index for index, mask in enumerate(masks) if settings.rescale and mask.drops_some]


def _factors(norms: Mapping[int, tuple[float, float]], num_models: int) -> list[float]:
    """By which the models' changes are multiplied, from the norms before and after of those that are rescaled."""
    factors = [1.0] * num_models
    for index, (whole, kept) in norms.items():
        if whole >= NEGLIGIBLE_NORM and kept >= NEGLIGIBLE_NORM:
            factors[index] = whole / kept
    return factors


def _trimmed(chunk: Chunk, operands: Operands) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """The base's run and the trimmed task vectors, not rescaled."""
    base, deltas = task_vectors(chunk)
    space = MaskSpace.like(base, chunk.scratch)
    for delta, mask in zip(deltas, _masks(operands), strict=True):
        mask.apply_(delta, chunk.start, space)
    return base, deltas


def _rescaling(statistics: list[float] | None, operands: Operands) -> Sequence[float]:
    """Factors of the models; without a pass of statistics there is nothing to rescale."""
    return [1.0] * operands.num_inputs if statistics is None else statistics


@METHODS.register("dare_linear")
class DareLinear(NormalizedMethod, _Dare):
    """``b + λ Σ w_i δ̃_i``, ``δ̃`` a task vector with elements dropped at random and rescaled."""

    name = "dare_linear"
    summary = "Drop changes at random, rescale, weighted sum."
    formula = "b + λ·Σ w_i·δ̃_i, divided by Σ w_i if normalize; δ̃ keeps each element with probability density"

    @classmethod
    def _sum_of_kept(cls, factors: Sequence[float], weights: Sequence[float], settings: DareParameters) -> Sum:
        divisor = single_divisor(weights) if settings.normalize else 1.0
        return Sum(factors, divisor, settings.lambda_, rounds_products=True)

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`; ``statistics`` are the factors, or None without rescaling.

        Raises:
            MergeError: the weights sum to zero and are to be normalised.
        """
        settings = operands.parameters
        weights = [parameters.weight for parameters in operands.input_parameters]
        total = divisor(weights, operands.compute_dtype, normalize=settings.normalize)
        rescaled = [w * r for w, r in zip(weights, _rescaling(statistics, operands), strict=True)]
        base, deltas = _trimmed(chunk, operands)
        return base.add_(rounded_sum_(deltas, rescaled, divisor=total, scale=settings.lambda_, scratch=chunk.scratch))


@METHODS.register("dare_ties")
class DareTies(_Dare):
    """As `DareLinear`, the sum taken by sign election (see `mergekit_ray.methods.shared.sign`)."""

    name = "dare_ties"
    summary = "Drop changes at random, rescale, elect a sign per element, merge what agrees."
    formula = "b + λ·Σ m_i·w_i·δ̃_i, over Σ m_i·w_i if normalize; m_i = [sign(w_i·δ̃_i) = elected sign]"

    @classmethod
    def _sum_of_kept(cls, factors: Sequence[float], weights: Sequence[float], settings: DareParameters) -> Elected:
        return Elected(factors, weights, settings.lambda_, settings.normalize)

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`; ``statistics`` are the factors, or None without rescaling."""
        settings = operands.parameters
        weights = [parameters.weight for parameters in operands.input_parameters]
        base, deltas = _trimmed(chunk, operands)
        return add_elected_(
            base,
            deltas,
            weights,
            factors=[w * r for w, r in zip(weights, _rescaling(statistics, operands), strict=True)],
            normalize=settings.normalize,
            scale=settings.lambda_,
            scratch=chunk.scratch,
        )

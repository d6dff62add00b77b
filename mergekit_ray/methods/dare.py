"""DARE: drop changes at random and rescale what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import Field

from mergekit_ray.core.declaration import Access, BaseUse
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.accumulate import coefficients, weighted_sum_
from mergekit_ray.methods.protocol import BLOCK_ELEMENTS, Chunk, Operands, ReduceMethod
from mergekit_ray.methods.random_mask import MaskSpace, RandomMask, apply_packed_
from mergekit_ray.methods.sign import add_elected_
from mergekit_ray.methods.sums import folded_sums, total
from mergekit_ray.methods.task_vectors import ScaledParameters, TrimmedParameters, task_vector, task_vectors

if TYPE_CHECKING:
    import torch

    from mergekit_ray.methods.random_mask import PackedMask

NEGLIGIBLE_NORM = 1e-7
"""L1 norms below this are not rescaled by or to."""


class DareParameters(ScaledParameters):
    """Global parameters of `DareLinear` and `DareTies`."""

    normalize: bool = Field(False, description="divide by the sum of the weights (dare_ties: of those that agree)")
    rescale: bool = Field(True, description="scale what is kept to the task vector's L1 norm")


class _Dare(ReduceMethod):
    """Random trim of task vectors: each element is kept with probability ``density`` (Yu et al. 2024)."""

    reference = "https://arxiv.org/abs/2311.03099"
    base = BaseUse.REQUIRED
    model_parameters = TrimmedParameters
    global_parameters = DareParameters

    @classmethod
    def effective_access(cls, parameters: dict[str, Any]) -> Access:
        """Without rescaling any run of elements alone will do."""
        rescale = cls.global_parameters.model_validate(parameters).model_dump()["rescale"]
        return Access.REDUCE if rescale else Access.ELEMENTWISE

    def statistics(self, operands: Operands) -> DareStatistics:
        """What is kept is scaled by ``‖δ‖₁ / ‖δ̃‖₁``, 1 where either is below `NEGLIGIBLE_NORM`."""
        factors = [1.0] * operands.num_inputs
        masks = _masks(operands)
        trimmed = [index for index, mask in enumerate(masks) if not mask.keeps_all and mask.density > 0]
        if not operands.parameters.rescale or not trimmed:
            return DareStatistics(factors, {})

        def measure(chunk: Chunk) -> list[_Norms]:
            space = MaskSpace.like(chunk.inputs[0], chunk.scratch)
            spare = chunk.scratch.like(chunk.inputs[0])
            return [_norms(chunk, index, masks[index], space, spare) for index in trimmed]

        blocks = operands.map_blocks(measure)
        for place, index in enumerate(trimmed):
            whole = total(block[place].whole for block in blocks)
            kept = total(block[place].kept for block in blocks)
            if whole >= NEGLIGIBLE_NORM and kept >= NEGLIGIBLE_NORM:
                factors[index] = whole / kept
        packed = {index: [block[place].mask for block in blocks] for place, index in enumerate(trimmed)}
        return DareStatistics(factors, packed)


@dataclass(frozen=True, slots=True)
class DareStatistics:
    """What the pass over the whole tensor found.

    Attributes:
        factors: rescaling of each model.
        masks: by model, the mask of each block in a bit per element where it is worth keeping (on the CPU, where to
            unpack it takes a fifth of the time to make it again).
    """

    factors: Sequence[float]
    masks: Mapping[int, Sequence[PackedMask | None]]

    def mask(self, index: int, start: int, num_elements: int) -> PackedMask | None:
        """The mask of a model over ``[start, start + num_elements)``, if that is a run of whole blocks."""
        first, offset = divmod(start, BLOCK_ELEMENTS)
        blocks = self.masks.get(index)
        if blocks is None or offset:
            return None
        last = first - (-num_elements // BLOCK_ELEMENTS)
        if num_elements % BLOCK_ELEMENTS and last != len(blocks):
            return None
        found = [block for block in blocks[first:last] if block is not None]
        if len(found) != last - first:
            return None
        import numpy as np  # noqa: PLC0415 - imported where it works, as torch is

        return found[0] if len(found) == 1 else np.concatenate(found)


class _Norms(NamedTuple):
    """Partial L1 sums of a run of a task vector before and after its mask, and the mask if it is kept."""

    whole: torch.Tensor
    kept: torch.Tensor
    mask: PackedMask | None


def _norms(chunk: Chunk, index: int, mask: RandomMask, space: MaskSpace, spare: torch.Tensor) -> _Norms:
    magnitude = task_vector(chunk, index).abs_()
    whole = folded_sums(magnitude, spare)
    packed = None
    if magnitude.device.type == "cpu":
        packed = mask.apply_and_pack_(magnitude, chunk.start, space)
    else:
        mask.apply_(magnitude, chunk.start, space)
    return _Norms(whole, folded_sums(magnitude, spare), packed)


def _masks(operands: Operands) -> list[RandomMask]:
    return [
        RandomMask(key, parameters.density)
        for key, parameters in zip(operands.keys, operands.input_parameters, strict=True)
    ]


def _trimmed(
    chunk: Chunk, operands: Operands, statistics: DareStatistics | None
) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
    """The base's run and the trimmed task vectors, not rescaled."""
    base, deltas = task_vectors(chunk)
    space = MaskSpace.like(base, chunk.scratch)
    for index, (delta, mask) in enumerate(zip(deltas, _masks(operands), strict=True)):
        packed = None if statistics is None else statistics.mask(index, chunk.start, delta.numel())
        if packed is None:
            mask.apply_(delta, chunk.start, space)
        else:
            apply_packed_(delta, packed, space)
    return base, deltas


def _rescaling(statistics: DareStatistics | None, operands: Operands) -> Sequence[float]:
    """Factors of the models; without a pass of statistics there is nothing to rescale."""
    return [1.0] * operands.num_inputs if statistics is None else statistics.factors


@METHODS.register("dare_linear")
class DareLinear(_Dare):
    """``b + λ Σ w_i δ̃_i``, ``δ̃`` a task vector with elements dropped at random and rescaled."""

    name = "dare_linear"
    summary = "Drop changes at random, rescale, weighted sum."
    formula = "b + λ·Σ w_i·δ̃_i, divided by Σ w_i if normalize; δ̃ keeps each element with probability density"

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`; ``statistics`` is a `DareStatistics`, or None without rescaling.

        Raises:
            MergeError: the weights sum to zero and are to be normalised.
        """
        settings = operands.parameters
        weights = [parameters.weight for parameters in operands.input_parameters]
        factors = coefficients(weights, normalize=settings.normalize, scale=settings.lambda_)
        rescaling = _rescaling(statistics, operands)
        base, deltas = _trimmed(chunk, operands, statistics)
        return base.add_(weighted_sum_(deltas, [f * r for f, r in zip(factors, rescaling, strict=True)]))


@METHODS.register("dare_ties")
class DareTies(_Dare):
    """As `DareLinear`, the sum taken by sign election (see `mergekit_ray.methods.sign`)."""

    name = "dare_ties"
    summary = "Drop changes at random, rescale, elect a sign per element, merge what agrees."
    formula = "b + λ·Σ m_i·w_i·δ̃_i, over Σ m_i·w_i if normalize; m_i = [sign(w_i·δ̃_i) = elected sign]"

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`; ``statistics`` is a `DareStatistics`, or None without rescaling."""
        settings = operands.parameters
        weights = [parameters.weight for parameters in operands.input_parameters]
        base, deltas = _trimmed(chunk, operands, statistics)
        for delta, weight, factor in zip(deltas, weights, _rescaling(statistics, operands), strict=True):
            delta.mul_(weight * factor)
        return add_elected_(
            base, deltas, weights, normalize=settings.normalize, scale=settings.lambda_, scratch=chunk.scratch
        )

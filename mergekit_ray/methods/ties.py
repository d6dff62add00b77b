"""TIES: trim, elect sign, disjoint merge."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mergekit_ray.core.declaration import BaseUse
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared.order_statistics import collected_bytes
from mergekit_ray.methods.shared.protocol import Chunk, Operands, ReduceMethod
from mergekit_ray.methods.shared.rescaling import rescaling_factors
from mergekit_ray.methods.shared.selection import Selection, select_largest
from mergekit_ray.methods.shared.sign import add_elected_
from mergekit_ray.methods.shared.task_vectors import ScaledParameters, TrimmedParameters, task_vector, task_vectors

if TYPE_CHECKING:
    import torch


class TiesParameters(ScaledParameters):
    """Global parameters of `Ties`."""

    normalize: bool = Field(True, description="divide by the weights of the models that agree with the elected sign")
    rescale: bool = Field(False, description="scale what is kept to the task vector's L1 norm")
    int8_mask: bool = Field(False, description="accepted, without effect on the result")


@dataclass(frozen=True, slots=True)
class Trimmed:
    """What the passes over the whole tensor found.

    Attributes:
        selections: what is kept of each model's task vector.
        factors: rescaling of each model.
    """

    selections: Sequence[Selection]
    factors: Sequence[float]


@METHODS.register("ties")
class Ties(ReduceMethod):
    """Keep the ``⌊density·n⌋`` largest changes of each model, elect a sign per element, average what agrees.

    Yadav et al. 2023, "TIES-Merging". Of equal magnitudes at the threshold the lowest flat index is kept first. With
    ``rescale``, which is not of the paper, what is kept is scaled by ``‖δ‖₁ / ‖δ̃‖₁``, as in DARE; where either norm is
    below 1e-7 it stays as it is.
    """

    name = "ties"
    summary = "Trim task vectors by magnitude, elect a sign per element, merge what agrees."
    formula = (
        "b + λ·Σ m_i·w_i·δ̃_i, over Σ m_i·w_i if normalize; δ̃ the ⌊density·n⌋ largest |δ|; m_i = [sign(w_i·δ̃_i) = s]"
    )
    reference = "https://arxiv.org/abs/2306.01708"
    base = BaseUse.REQUIRED
    model_parameters = TrimmedParameters
    global_parameters = TiesParameters

    @classmethod
    def working_bytes(cls, shape: tuple[int, ...], num_models: int, itemsize: int) -> int:
        """See `MethodDeclaration.working_bytes`."""
        return collected_bytes(math.prod(shape), num_models, itemsize)

    def statistics(self, operands: Operands) -> Trimmed:
        """What is kept of each model's task vector, and how it is rescaled."""
        num_elements = operands.num_elements
        counts = [math.floor(parameters.density * num_elements) for parameters in operands.input_parameters]
        selections = select_largest(operands, counts, task_vector)
        factors = [1.0] * operands.num_inputs
        if operands.parameters.rescale:
            factors = rescaling_factors(operands, lambda delta, index, start: selections[index].trim_(delta, start))
        return Trimmed(selections, factors)

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`; ``statistics`` is the `Trimmed`."""
        trimmed: Trimmed = statistics
        settings = operands.parameters
        weights = [parameters.weight for parameters in operands.input_parameters]
        base, deltas = task_vectors(chunk)
        for delta, selection in zip(deltas, trimmed.selections, strict=True):
            selection.trim_(delta, chunk.start)
        return add_elected_(
            base,
            deltas,
            weights,
            factors=[w * r for w, r in zip(weights, trimmed.factors, strict=True)],
            normalize=settings.normalize,
            scale=settings.lambda_,
            scratch=chunk.scratch,
        )

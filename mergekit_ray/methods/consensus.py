"""Consensus merging: what only one task, or none, has a use for is left out of the merged task vector."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mergekit_ray.core.declaration import BaseUse, Parameters
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared.accumulate import add_scaled_
from mergekit_ray.methods.shared.order_statistics import collected_bytes
from mergekit_ray.methods.shared.protocol import Chunk, ElementwiseMethod, Operands, ReduceMethod
from mergekit_ray.methods.shared.selection import Selection, select_largest
from mergekit_ray.methods.shared.sign import add_elected_
from mergekit_ray.methods.shared.task_vectors import ScaledParameters, task_vector, task_vectors

if TYPE_CHECKING:
    import torch

    from mergekit_ray.methods.shared.scratch import Scratch


class ConsensusTaModelParameters(Parameters):
    """Per-model parameters of `ConsensusTa`."""

    weight: float = Field(1.0, description="weight of the model's task vector in the sum", allow_inf_nan=False)
    tall_mask_lambda: float = Field(
        0.4,
        description="λ_i of the model's mask: the larger, the closer the merged change must come to the model's own",
        ge=0.0,
        allow_inf_nan=False,
    )


class ConsensusTiesModelParameters(ConsensusTaModelParameters):
    """Per-model parameters of `ConsensusTies`."""

    density: float = Field(0.2, description="part of the task vector that TIES keeps", ge=0.0, le=1.0)


class ConsensusParameters(ScaledParameters):
    """Global parameters of `ConsensusTa` and `ConsensusTies`."""

    k: int = Field(2, description="keep elements that at least this many models' masks hold", ge=0)


@METHODS.register("consensus_ta")
class ConsensusTa(ElementwiseMethod):
    """Consensus TA: ``b + λ [Σ m_i >= k] Σ w_i δ_i``, ``m_i = 1[|δ_i| >= λ_i |δ_mtl − δ_i|]``, ``δ_mtl = Σ w_i δ_i``.

    Wang et al. 2024, "Localizing Task Information for Improved Model Merging and Compression" (TALL masks). A mask
    holds the elements in which the multi-task vector serves its model; with ``k = 2`` "catastrophic" elements (in no
    mask) and "selfish" ones (in one) are dropped, ``k = 0`` is task arithmetic, and ``k`` above the number of models
    leaves the base. Of one model alone with ``k = 2`` nothing is left, as the formula says.

    The paper has no weights: here they enter ``δ_mtl``, and masks compare it with the models' own, unweighted task
    vectors, as the distance to the model itself asks for. It tunes each λ_i over {0.2, …, 0.6} on validation data;
    the default is their middle. An element unchanged everywhere is in every mask and stays as it is.
    """

    name = "consensus_ta"
    summary = "Sum of task vectors without the elements that fewer than k models use."
    formula = "b + λ·[Σ m_i ≥ k]·δ_mtl, δ_mtl = Σ w_i·δ_i, m_i = [|δ_i| ≥ λ_i·|δ_mtl − δ_i|]"
    reference = "https://arxiv.org/abs/2405.07813"
    base = BaseUse.REQUIRED
    model_parameters = ConsensusTaModelParameters
    global_parameters = ConsensusParameters
    propagates_non_finite = True

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`."""
        import torch  # noqa: PLC0415 - declarations are read without torch

        del statistics
        base, deltas = task_vectors(chunk)
        weights = [parameters.weight for parameters in operands.input_parameters]
        merged, spare = chunk.scratch.like(base), chunk.scratch.like(base)
        torch.mul(deltas[0], weights[0], out=merged)
        for delta, weight in zip(deltas[1:], weights[1:], strict=True):
            merged.add_(torch.mul(delta, weight, out=spare))
        return _add_consensus_(base, merged, deltas, operands, chunk.scratch)


@METHODS.register("consensus_ties")
class ConsensusTies(ReduceMethod):
    """Consensus TIES: as `ConsensusTa` with the multi-task vector of TIES.

    Wang et al. 2024. ``δ_mtl`` is the sum, not the mean, of what agrees with the elected sign after each model's
    ``⌊density·n⌋`` largest changes are kept, as in the authors' experiments (density 0.2); see `Ties`. The masks
    compare it with whole task vectors, before they are trimmed.
    """

    name = "consensus_ties"
    summary = "TIES' multi-task vector without the elements that fewer than k models use."
    formula = (
        "b + λ·[Σ m_i ≥ k]·δ_mtl, δ_mtl = Σ [sign(w_i·δ̃_i) = s]·w_i·δ̃_i, δ̃ the ⌊density·n⌋ largest |δ|, "
        "m_i = [|δ_i| ≥ λ_i·|δ_mtl − δ_i|]"
    )
    reference = "https://arxiv.org/abs/2405.07813"
    base = BaseUse.REQUIRED
    model_parameters = ConsensusTiesModelParameters
    global_parameters = ConsensusParameters

    @classmethod
    def working_bytes(cls, shape: tuple[int, ...], num_models: int, itemsize: int) -> int:
        """See `MethodDeclaration.working_bytes`."""
        return collected_bytes(math.prod(shape), num_models, itemsize)

    def statistics(self, operands: Operands) -> list[Selection]:
        """What is kept of each model's task vector."""
        counts = [math.floor(parameters.density * operands.num_elements) for parameters in operands.input_parameters]
        return select_largest(operands, counts, task_vector)

    def combine(self, chunk: Chunk, operands: Operands, statistics: Any) -> torch.Tensor:
        """See `ElementwiseMethod.combine`; ``statistics`` is one `Selection` per model."""
        selections: list[Selection] = statistics
        weights = [parameters.weight for parameters in operands.input_parameters]
        base, deltas = task_vectors(chunk)
        trimmed = [
            selection.trim_(chunk.scratch.like(delta).copy_(delta), chunk.start)
            for delta, selection in zip(deltas, selections, strict=True)
        ]
        merged = chunk.scratch.like(base).zero_()
        add_elected_(merged, trimmed, weights, normalize=False, scale=1.0, scratch=chunk.scratch)
        return _add_consensus_(base, merged, deltas, operands, chunk.scratch)


def _add_consensus_(
    base: torch.Tensor, merged: torch.Tensor, deltas: Sequence[torch.Tensor], operands: Operands, scratch: Scratch
) -> torch.Tensor:
    """``b + λ [Σ m_i >= k] δ_mtl`` in place of the base; ``merged`` (δ_mtl) and ``deltas`` are overwritten."""
    import torch  # noqa: PLC0415 - declarations are read without torch

    settings: ConsensusParameters = operands.parameters
    distance = scratch.like(base)
    num_masks = scratch.like(base).zero_()
    for delta, parameters in zip(deltas, operands.input_parameters, strict=True):
        torch.sub(merged, delta, out=distance).abs_().mul_(parameters.tall_mask_lambda)
        num_masks.add_(delta.abs_().ge_(distance))
    add_scaled_(base, merged.mul_(num_masks.ge_(settings.k)), settings.lambda_)
    return base

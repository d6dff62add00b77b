"""Isotropic merging: all directions of the merged task vector get the same singular value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared.protocol import Operands
from mergekit_ray.methods.shared.spectral import (
    RowMap,
    SpectralMethod,
    Spectrum,
    TaskMatrices,
    decomposition_bytes,
    recombined,
    spectrum,
    total,
)
from mergekit_ray.methods.shared.task_vectors import ScaledParameters

if TYPE_CHECKING:
    import torch


@METHODS.register("iso_c")
class IsoC(SpectralMethod):
    """Iso-C: ``σ̄ U Vᵀ`` of the summed task matrices ``Σ w_i δ_i = U Σ Vᵀ``, ``σ̄`` the mean of the singular values.

    Marczak et al. 2025, "No Task Left Behind". The mean is over all ``min(m, n)`` singular values, zeros among them.
    ``U Vᵀ`` is unique whether or not singular values are distinct; directions in which the sum is zero stay zero
    (the paper leaves them open). One model is made isotropic like several; models equal to the base leave it as it is.

    The paper tunes λ on validation data. It applies the method to every two-dimensional weight; in language models that
    includes embeddings, where a ``lambda`` of 0 by tensor-name filter keeps the base's. All other weights are averaged
    (see `SpectralMethod`). Low-rank task vectors stored in few bits are a caution: what rounding left in the other
    directions is raised to the mean along with what was learned.

    One factorisation of the sum, see `mergekit_ray.methods.shared.spectral`.
    """

    name = "iso_c"
    summary = "Sum of task matrices with all singular values replaced by their mean."
    formula = "b + λ·σ̄·U·Vᵀ, Σ w_i·δ_i = U·diag(σ)·Vᵀ; b + λ/N·Σ w_i·δ_i for weights that are not matrices"
    reference = "https://arxiv.org/abs/2502.04959"

    @classmethod
    def working_bytes(cls, shape: tuple[int, ...], num_models: int, itemsize: int) -> int:
        """See `MethodDeclaration.working_bytes`."""
        del itemsize
        return decomposition_bytes(shape, num_models, tensors_per_model=0)

    def merged_matrix(self, tasks: TaskMatrices, operands: Operands) -> RowMap:
        """See `SpectralMethod.merged_matrix`."""
        del operands
        summed = spectrum(tasks.map(total))
        factor = summed.whitening * summed.values.mean()
        return lambda deltas: total(deltas) @ factor


class IsoCtsParameters(ScaledParameters):
    """Global parameters of `IsoCts`."""

    common_space_fraction: float = Field(
        0.8,
        description="part of the directions taken from the sum; the rest is shared out to the models",
        ge=0.0,
        le=1.0,
    )


@METHODS.register("iso_cts")
class IsoCts(SpectralMethod):
    """Iso-CTS: as Iso-C, but the weakest directions of the sum make way for the strongest of each model's own.

    Marczak et al. 2025, "No Task Left Behind". With ``r = min(m, n)`` directions and ``N`` models, ``s`` of them go to
    each model and ``k = r − N s`` are common; ``s = round((r − ⌊r · common_space_fraction⌋) / N)``, as in the authors'
    code (halves to even), here at most ``⌊r / N⌋``:

    - common: the ``k`` leading singular vectors ``U_c, V_c`` of ``Σ w_i δ_i``;
    - of model i: the ``s`` leading singular vectors of ``(I − U_c U_cᵀ) w_i δ_i``;
    - side by side, ``U`` and ``V`` are made orthogonal by their polar factors, and ``σ̄`` is the mean of the ``r``
      singular values: ``Δ = σ̄ U⊥ V⊥ᵀ``.

    With ``s = 0`` this is `IsoC`. Directions with a zero singular value are left out of ``U`` and ``V`` (the paper
    leaves them open), and count as zeros in the mean; a model in the common space has no others. The result
    is unique where the k-th and (k+1)-th singular values of the sum differ, and the s-th and (s+1)-th of each model's;
    where they are equal, which of the equal directions are kept is up to the decomposition. Models equal to the base
    leave it as it is.

    λ, embeddings and weights that are not matrices as in `IsoC`. ``N + 2`` factorisations, and ``N`` passes over the
    task vectors for the projections.
    """

    name = "iso_cts"
    summary = "Isotropic merge of the directions common to all models and of those of each model alone."
    formula = (
        "b + λ·σ̄·polar([U_c U_1 … U_N])·polar([V_c V_1 … V_N])ᵀ; U_c, V_c of Σ w_i·δ_i, U_i, V_i of "
        "(I − U_c·U_cᵀ)·w_i·δ_i; b + λ/N·Σ w_i·δ_i for weights that are not matrices"
    )
    reference = "https://arxiv.org/abs/2502.04959"
    global_parameters = IsoCtsParameters

    def merged_matrix(self, tasks: TaskMatrices, operands: Operands) -> RowMap:
        """See `SpectralMethod.merged_matrix`."""
        import torch  # noqa: PLC0415 - declarations are read without torch

        rank, num_tasks = tasks.num_columns, len(tasks.inputs)
        per_task = directions_per_task(rank, num_tasks, operands.parameters.common_space_fraction)
        common = spectrum(tasks.map(total)).leading(rank - num_tasks * per_task)
        residual = _residuals(tasks, common)

        def own_part(index: int) -> RowMap:
            return lambda deltas: residual(deltas, index, total(deltas) @ common.to_left)

        own = [
            spectrum(tasks.map(own_part(index)), size=tasks.norm(index)).leading(per_task) for index in range(num_tasks)
        ]

        def left(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
            shared = total(deltas) @ common.to_left
            parts = [residual(deltas, index, shared) @ found.to_left for index, found in enumerate(own)]
            return torch.cat([shared, *parts], dim=1)

        values = torch.cat([common.values, *(found.values for found in own)])
        right = torch.cat([common.right, *(found.right for found in own)], dim=1)
        return recombined(tasks, left, values.mean().expand_as(values), right)


def directions_per_task(rank: int, num_tasks: int, common_space_fraction: float) -> int:
    """How many singular directions each model contributes, of ``rank`` in all."""
    specific = rank - math.floor(rank * common_space_fraction)
    return min(round(specific / num_tasks), rank // num_tasks)


def _residuals(
    tasks: TaskMatrices, common: Spectrum
) -> Callable[[Sequence[torch.Tensor], int, torch.Tensor], torch.Tensor]:
    """Task matrices without what is in the common left singular vectors of the weights as they are stored.

    Returns:
        From rows of all task vectors, the number of a model, and the same rows of the common left singular vectors of
        ``tasks``, to rows of that model's.
    """
    import torch  # noqa: PLC0415

    if tasks.is_transposed:  # whose right singular vectors are the left ones of what is stored
        return lambda deltas, index, _: deltas[index] - (deltas[index] @ common.right) @ common.right.mT

    def inner_products(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
        return (total(deltas) @ common.to_left).mT @ torch.cat(list(deltas), dim=1)

    joined, width = total(tasks.map(inner_products)), tasks.num_columns
    coefficients = [joined[:, index * width : (index + 1) * width] for index in range(len(tasks.inputs))]
    return lambda deltas, index, shared: deltas[index] - shared @ coefficients[index]

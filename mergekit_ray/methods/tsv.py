"""TSV-Merge: the leading singular vectors of each task, made orthogonal to each other's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared.protocol import Operands
from mergekit_ray.methods.shared.spectral import RowMap, SpectralMethod, TaskMatrices, recombined, spectrum

if TYPE_CHECKING:
    import torch


@METHODS.register("tsv_m")
class TsvM(SpectralMethod):
    """TSV-M: low-rank parts of the task matrices, joined after their singular vectors are decorrelated.

    Gargiulo et al. 2025, "Task Singular Vectors". Of each ``w_i δ_i = U_i Σ_i V_iᵀ`` the ``k = ⌊min(m, n) / N⌋``
    leading singular directions are kept; side by side, ``U = [U_1 … U_N]`` and ``V`` are replaced by the nearest
    matrices with orthonormal columns (orthogonal Procrustes, the polar factors), and ``Δ = U⊥ Σ V⊥ᵀ``, ``Σ`` all
    singular values that were kept. The paper's λ is 1.

    The paper leaves two cases open. Matrices with fewer than ``N`` rows or columns: here ``k`` is at least 1.
    Directions that the tasks share, or with a singular value of zero, make ``U`` or ``V`` singular: here the polar
    factor leaves the missing directions out, so that ``N`` equal models give the model's own low-rank part, and a model
    equal to the base disturbs nobody (though it counts in ``N``). The result is unique where the k-th and (k+1)-th
    singular values of each task differ; otherwise, which of the equal directions are kept is up to the decomposition.

    Every two-dimensional weight is merged so, embeddings included; all others are averaged (see `SpectralMethod`).
    ``N + 2`` factorisations, see `mergekit_ray.methods.shared.spectral`.
    """

    name = "tsv_m"
    summary = "Leading singular vectors of each task matrix, decorrelated and put together."
    formula = (
        "b + λ·polar([U_1 … U_N])·diag(σ_1 … σ_N)·polar([V_1 … V_N])ᵀ, U_i, σ_i, V_i the ⌊min(m, n)/N⌋ leading of "
        "w_i·δ_i; b + λ/N·Σ w_i·δ_i for weights that are not matrices"
    )
    reference = "https://arxiv.org/abs/2412.00081"

    def merged_matrix(self, tasks: TaskMatrices, operands: Operands) -> RowMap:
        """See `SpectralMethod.merged_matrix`."""
        import torch  # noqa: PLC0415 - declarations are read without torch

        del operands
        num_tasks = len(tasks.inputs)
        rank = max(1, tasks.num_columns // num_tasks)
        kept = [spectrum(tasks.map_one(index)).leading(rank) for index in range(num_tasks)]

        def left(deltas: Sequence[torch.Tensor]) -> torch.Tensor:
            return torch.cat([delta @ found.to_left for delta, found in zip(deltas, kept, strict=True)], dim=1)

        values = torch.cat([found.values for found in kept])
        return recombined(tasks, left, values, torch.cat([found.right for found in kept], dim=1))

"""A linear map from the donor's rows to the model's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mergekit_ray.core.approximation import APPROXIMATIONS
from mergekit_ray.methods.approximation.protocol import Approximation, Shared

if TYPE_CHECKING:
    import torch


@APPROXIMATIONS.register("landmark_pca")
class LandmarkPca(Approximation):
    """Regression on the principal components of the shared tokens.

    The donor's shared rows are rotated to their principal components; the model's rows are regressed on all components
    that are more than rounding, and the missing rows are mapped in the same way.
    """

    name = "landmark_pca"
    summary = "The best linear map from the donor's rows of shared tokens to the model's, applied to the others."
    formula = "ν + (x − μ) V S⁻¹ Uᵀ B, with the means μ and ν, A − μ = U S Vᵀ, and the centred rows B of the model"
    reference = 'W. F. Massy 1965, "Principal components regression in exploratory statistical research"'
    uses_model = True
    uses_donor = True

    @classmethod
    def working_bytes(cls, parameters: Mapping[str, Any], num_shared: int, model_width: int, donor_width: int) -> int:
        """See `ApproximationDeclaration.working_bytes`: square matrices of the donor's width, and the map."""
        from mergekit_ray.methods.shared.moments import BLOCK_ROWS, EIGEN_MATRICES  # noqa: PLC0415

        del parameters, num_shared
        wide = donor_width + model_width
        return 8 * donor_width * (EIGEN_MATRICES * donor_width + 3 * model_width) + 8 * 2 * BLOCK_ROWS * wide

    def fit(self, shared: Shared) -> Any:
        """See `Approximation.fit`: both means and the map."""
        from mergekit_ray.methods.shared.moments import mean, regression  # noqa: PLC0415

        assert shared.donor is not None
        assert shared.model is not None
        middles = mean(shared.donor), mean(shared.model)
        return *middles, regression(shared.donor, shared.model, *middles)

    def approximate(self, fitted: Any, missing: torch.Tensor | None, start: int, out: torch.Tensor) -> None:
        """See `Approximation.approximate`."""
        from mergekit_ray.methods.compiled.pursuit import transform  # noqa: PLC0415

        del start
        assert missing is not None
        ours, theirs, matrix = fitted
        transform((missing.double() - ours).numpy(), matrix.numpy(), theirs.numpy(), out.numpy())

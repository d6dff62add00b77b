"""Interpolation between the nearest tokens that both models have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mergekit_ray.core.approximation import APPROXIMATIONS
from mergekit_ray.core.declaration import Parameters
from mergekit_ray.methods.approximation.protocol import Approximation, Shared

if TYPE_CHECKING:
    import torch


class InterpolationParameters(Parameters):
    """Parameters of `CommonInterpolation`."""

    k: int = Field(64, description="neighbours", ge=1)
    metric: Literal["euclidean", "cosine"] = Field("euclidean", description="what is near: euclidean or cosine")
    weights: Literal["distance_proportional", "barycentric", "least_squares"] = Field(
        "distance_proportional",
        description="of neighbours: distance_proportional (as 1/distance, or as the cosine), barycentric (the best "
        "that sum to 1) or least_squares (the best)",
    )


@APPROXIMATIONS.register("common_interpolation")
class CommonInterpolation(Approximation):
    """The ``k`` tokens nearest to the missing one in the donor, weighted there.

    With the euclidean metric, ``distance_proportional`` weights are as the reciprocals of distances, and a distance of
    zero takes all weight; with the other they are as the cosines, of which negative ones count as zero. If all are
    zero, neighbours weigh the same. Of equally near tokens the first are taken.
    """

    name = "common_interpolation"
    summary = "Weighted sum of the nearest shared tokens."
    formula = "Σ w_i b_i over the k nearest a_i, with weights that depend on x and the a_i"
    parameters = InterpolationParameters
    uses_model = True
    uses_donor = True

    @classmethod
    def working_bytes(cls, parameters: Mapping[str, Any], num_shared: int, model_width: int, donor_width: int) -> int:
        """See `ApproximationDeclaration.working_bytes`: products of the batches, and neighbours of a row."""
        del model_width
        k = int(parameters.get("k", cls.parameters.model_fields["k"].default))
        return 8 * num_shared + 8 * (3 * 4 * cls.batch_rows * num_shared + 4 * 8 * k * donor_width)

    @classmethod
    def row_work(cls, parameters: Mapping[str, Any], num_shared: int, model_width: int, donor_width: int) -> float:
        """See `ApproximationDeclaration.row_work`: inner products with all shared rows."""
        del parameters, model_width
        return 2.0 * num_shared * donor_width

    def fit(self, shared: Shared) -> Any:
        """See `Approximation.fit`: the donor's squared norms."""
        from mergekit_ray.methods.shared.pursuit import squared_norms  # noqa: PLC0415 - imports torch and loops

        assert shared.donor is not None
        return shared, squared_norms(shared.donor)

    def approximate(self, fitted: Any, missing: torch.Tensor | None, start: int, out: torch.Tensor) -> None:
        """See `Approximation.approximate`."""
        from mergekit_ray.methods.shared.neighbours import interpolation  # noqa: PLC0415 - as above
        from mergekit_ray.methods.shared.pursuit import combined  # noqa: PLC0415

        del start
        shared, squares = fitted
        assert missing is not None
        found = interpolation(
            shared.donor,
            squares,
            missing,
            self.chosen.k,
            is_cosine=self.chosen.metric == "cosine",
            scheme=self.chosen.weights,
        )
        combined(found, shared.model, out)

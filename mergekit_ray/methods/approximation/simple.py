"""Rows that do not depend on the token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mergekit_ray.core.approximation import APPROXIMATIONS
from mergekit_ray.methods.approximation.protocol import Approximation, Shared

if TYPE_CHECKING:
    import torch


@APPROXIMATIONS.register("zero")
class Zero(Approximation):
    """Zeros."""

    name = "zero"
    summary = "Zeros."
    formula = "0"

    def approximate(self, fitted: Any, missing: torch.Tensor | None, start: int, out: torch.Tensor) -> None:
        """See `Approximation.approximate`."""
        del fitted, missing, start
        out.zero_()


@APPROXIMATIONS.register("mean")
class Mean(Approximation):
    """The mean of all rows of the model."""

    name = "mean"
    summary = "The mean of the model's rows."
    formula = "mean of all b_i"
    uses_model = True

    @classmethod
    def working_bytes(cls, parameters: Mapping[str, Any], num_shared: int, model_width: int, donor_width: int) -> int:
        """See `ApproximationDeclaration.working_bytes`."""
        from mergekit_ray.methods.shared.moments import BLOCK_ROWS  # noqa: PLC0415

        del parameters, num_shared, donor_width
        return 8 * (BLOCK_ROWS + 2) * model_width

    def fit(self, shared: Shared) -> Any:
        """See `Approximation.fit`: the mean."""
        from mergekit_ray.methods.shared.moments import mean  # noqa: PLC0415

        assert shared.model is not None
        return mean(shared.model)

    def approximate(self, fitted: Any, missing: torch.Tensor | None, start: int, out: torch.Tensor) -> None:
        """See `Approximation.approximate`."""
        del missing, start
        out.copy_(fitted)

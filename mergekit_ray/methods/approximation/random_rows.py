"""Rows that are drawn at random: from a standard normal distribution, or from that of the model's rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mergekit_ray.core.approximation import APPROXIMATIONS
from mergekit_ray.methods.approximation.protocol import Approximation, Shared

if TYPE_CHECKING:
    import numpy as np
    import torch


class _Drawn(Approximation):
    def drawn(self, start: int, rows: int, elements: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Standard normal numbers, ``[rows, elements]``, for the rows from ``start`` on."""
        return self.draw(start * elements, rows * elements).reshape(rows, elements)


@APPROXIMATIONS.register("randn")
class Randn(_Drawn):
    """Standard normal numbers."""

    name = "randn"
    summary = "Standard normal noise."
    formula = "z, each element from N(0, 1)"

    def approximate(self, fitted: Any, missing: torch.Tensor | None, start: int, out: torch.Tensor) -> None:
        """See `Approximation.approximate`."""
        import torch  # noqa: PLC0415 - declarations are read without torch

        del fitted, missing
        out.copy_(torch.from_numpy(self.drawn(start, *out.shape)))


@APPROXIMATIONS.register("john_hewitt")
class JohnHewitt(_Drawn):
    """Normal numbers with the mean and the covariance of all rows of the model."""

    name = "john_hewitt"
    summary = "Normal noise with the mean and covariance of the model's rows."
    formula = "μ + √Σ z, with the mean μ and covariance Σ of all b_i, and z from N(0, 1)"
    reference = (
        'J. Hewitt 2021, "Initializing new word embeddings for pretrained language models", '
        "https://nlp.stanford.edu/~johnhew/vocab-expansion.html"
    )
    uses_model = True

    @classmethod
    def working_bytes(cls, parameters: Mapping[str, Any], num_shared: int, model_width: int, donor_width: int) -> int:
        """See `ApproximationDeclaration.working_bytes`: square matrices for the root of the covariance."""
        from mergekit_ray.methods.shared.moments import BLOCK_ROWS, EIGEN_MATRICES  # noqa: PLC0415

        del parameters, num_shared, donor_width
        return 8 * model_width * (EIGEN_MATRICES * model_width + 2 * BLOCK_ROWS)

    def fit(self, shared: Shared) -> Any:
        """See `Approximation.fit`: the mean, and the symmetric root of the covariance."""
        from mergekit_ray.methods.shared.moments import covariance, mean, root  # noqa: PLC0415

        assert shared.model is not None
        middle = mean(shared.model)
        return middle, root(covariance(shared.model, middle))

    def approximate(self, fitted: Any, missing: torch.Tensor | None, start: int, out: torch.Tensor) -> None:
        """See `Approximation.approximate`."""
        from mergekit_ray.methods.compiled.pursuit import transform  # noqa: PLC0415

        del missing
        middle, matrix = fitted
        transform(self.drawn(start, *out.shape), matrix.numpy(), middle.numpy(), out.numpy())

"""Orthogonal matching pursuit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from pydantic import Field

from mergekit_ray.core.approximation import APPROXIMATIONS
from mergekit_ray.core.declaration import Parameters
from mergekit_ray.methods.approximation.protocol import Approximation, Shared

if TYPE_CHECKING:
    import torch

_ATOMS: Final = 1024
"""Shared tokens that a batch is multiplied with at a time."""

_THREADS: Final = 8
"""Threads of a worker, at most."""


class SparseParameters(Parameters):
    """Parameters of `Omp`."""

    k: int = Field(64, description="tokens that a row is made of, at most", ge=1)


@APPROXIMATIONS.register("omp")
class Omp(Approximation):
    """Tokens are chosen one by one: each time the one whose donor row has the largest inner product with what is left.

    Rows are not normalised first. The choice is made to float64's accuracy, and of equals the first is taken: see
    `mergekit_ray.methods.shared.pursuit`. A row ends early once nothing but rounding is left, or the next token would
    add nothing.
    """

    name = "omp"
    summary = "Sparse combination of shared tokens, chosen greedily in the donor and carried over."
    formula = "Σ c_i b_i, where Σ c_i a_i is the best approximation of x by the k chosen tokens"
    reference = (
        "C. Goddard and F. Fernandes Neto 2025, https://arxiv.org/abs/2506.06607; Y. C. Pati, R. Rezaiifar and "
        'P. S. Krishnaprasad 1993, "Orthogonal matching pursuit: recursive function approximation with applications to '
        'wavelet decomposition"'
    )
    parameters = SparseParameters
    uses_model = True
    uses_donor = True
    batch_rows = 128

    @classmethod
    def working_bytes(cls, parameters: Mapping[str, Any], num_shared: int, model_width: int, donor_width: int) -> int:
        """See `ApproximationDeclaration.working_bytes`: squared norms, and the batch of each thread."""
        k = cls._k(parameters)
        of_row = 2 * 4 * donor_width + 4 * _ATOMS + 8 * k * (k + 3) + 4 * model_width
        return 8 * num_shared + _THREADS * (cls.batch_rows * of_row + 4 * _ATOMS * donor_width)

    @classmethod
    def row_work(cls, parameters: Mapping[str, Any], num_shared: int, model_width: int, donor_width: int) -> float:
        """See `ApproximationDeclaration.row_work`: inner products with all shared rows, for each token chosen."""
        del model_width
        return 2.0 * num_shared * donor_width * min(cls._k(parameters), num_shared)

    @classmethod
    def _k(cls, parameters: Mapping[str, Any]) -> int:
        return int(parameters.get("k", cls.parameters.model_fields["k"].default))

    def fit(self, shared: Shared) -> Any:
        """The longest of the donor's rows, which bounds the rounding of products."""
        from mergekit_ray.methods.shared.pursuit import squared_norms  # noqa: PLC0415 - imports torch and loops

        assert shared.donor is not None
        return shared, float(squared_norms(shared.donor).max()) ** 0.5

    def approximate(self, fitted: Any, missing: torch.Tensor | None, start: int, out: torch.Tensor) -> None:
        """See `Approximation.approximate`."""
        from mergekit_ray.methods.shared.pursuit import combined, pursuit  # noqa: PLC0415 - as above

        del start
        shared, longest = fitted
        assert missing is not None
        combined(pursuit(shared.donor, longest, missing, self.chosen.k), shared.model, out)

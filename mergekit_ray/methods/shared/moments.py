"""Means, covariances and linear maps of the rows of matrices, in float64 over fixed blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from mergekit_ray.methods.shared.stored_rows import Rows

if TYPE_CHECKING:
    import torch

BLOCK_ROWS: Final = 1024
"""Rows in float64 at a time. Fixed: sums over blocks depend on it."""

EIGEN_MATRICES: Final = 6
"""Square float64 matrices held at once: the covariance, its eigenvectors, the solver's workspace, a product."""

_ROUNDING: Final = 1e-12
"""Eigenvalues up to this part of the largest are rounding: of a covariance of float32 numbers no more is known."""


def mean(rows: Rows) -> torch.Tensor:
    """``[elements]``, zeros if there are no rows."""
    import torch  # noqa: PLC0415 - declarations are read without torch

    total = torch.zeros(rows.num_elements, dtype=torch.float64)
    for first in range(0, rows.num_rows, BLOCK_ROWS):
        total += rows.doubles(first, first + BLOCK_ROWS).sum(dim=0)
    return total / max(1, rows.num_rows)


def covariance(rows: Rows, middle: torch.Tensor) -> torch.Tensor:
    """``[elements, elements]``: the mean of products of deviations from the mean."""
    return _products(rows, middle, rows, middle) / max(1, rows.num_rows)


def root(matrix: torch.Tensor) -> torch.Tensor:
    """The symmetric square root of a covariance, in which negative eigenvalues, which are rounding, are zero.

    NaN where the matrix is not finite.
    """
    import torch  # noqa: PLC0415

    if not torch.isfinite(matrix).all():
        return torch.full_like(matrix, torch.nan)
    values, vectors = torch.linalg.eigh(matrix)
    found: torch.Tensor = (vectors * values.clamp_min(0.0).sqrt()) @ vectors.t()
    return found.contiguous()


def regression(rows: Rows, others: Rows, middle: torch.Tensor, other_middle: torch.Tensor) -> torch.Tensor:
    """The map ``[elements, other elements]`` of least squares from the deviations of some rows to those of others.

    Of all such maps the smallest: directions in which the rows do not differ are mapped to zero. NaN where something is
    not finite.
    """
    import torch  # noqa: PLC0415

    matrix, across = _products(rows, middle, rows, middle), _products(rows, middle, others, other_middle)
    if not (torch.isfinite(matrix).all() and torch.isfinite(across).all()):
        return torch.full_like(across, torch.nan)
    values, vectors = torch.linalg.eigh(matrix)
    is_more = values > values[-1] * _ROUNDING
    inverse = torch.where(is_more, 1.0 / torch.where(is_more, values, 1.0), 0.0)
    found: torch.Tensor = (vectors * inverse) @ (vectors.t() @ across)
    return found.contiguous()


def _products(rows: Rows, middle: torch.Tensor, others: Rows, other_middle: torch.Tensor) -> torch.Tensor:
    import torch  # noqa: PLC0415

    total = torch.zeros(rows.num_elements, others.num_elements, dtype=torch.float64)
    for first in range(0, rows.num_rows, BLOCK_ROWS):
        left = rows.doubles(first, first + BLOCK_ROWS) - middle
        right = left if others is rows else others.doubles(first, first + BLOCK_ROWS) - other_middle
        total.addmm_(left.t(), right)
    return total

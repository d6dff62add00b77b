"""Nearest shared tokens and their weights, against formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from support.references.approximations import Array, approximate


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weighed(x: Array, atoms: Array, k: int, metric: str, scheme: str) -> tuple[Array, Array]:
    """The nearest and their weights; the constrained ones by Lagrange's multipliers."""
    distances = np.linalg.norm(atoms - x, axis=1)
    cosines = atoms @ x / np.linalg.norm(atoms, axis=1) / np.linalg.norm(x)
    near = np.argsort(distances if metric == "euclidean" else -cosines, kind="stable")[:k]
    rows = atoms[near]
    if scheme == "least_squares":
        return near, np.linalg.lstsq(rows.T, x, rcond=None)[0]
    if scheme == "barycentric":
        gram = np.block([[rows @ rows.T, np.ones((k, 1))], [np.ones((1, k)), np.zeros((1, 1))]])
        return near, np.linalg.solve(gram, np.append(rows @ x, 1.0))[:k]
    weights = 1 / distances[near] if metric == "euclidean" else np.maximum(cosines[near], 0)
    return near, weights / weights.sum()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("scheme", ["distance_proportional", "barycentric", "least_squares"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_like_the_formulas(metric: str, scheme: str, dtype: torch.dtype) -> None:
    model, donor, missing = normal(200, 12, seed=1), normal(200, 24, seed=2, dtype=dtype), normal(7, 24, seed=3)
    donor[::3] *= 3.0
    found = approximate("common_interpolation", model, donor, missing, k=6, metric=metric, weights=scheme)
    for x, row in zip(missing.double().numpy(), found.double().numpy(), strict=True):
        near, weights = weighed(x, donor.double().numpy(), 6, metric, scheme)
        np.testing.assert_allclose(row, weights @ model.double().numpy()[near], atol=1e-5)


def test_what_is_there_itself_takes_all_weight() -> None:
    model, donor = normal(40, 6, seed=4), normal(40, 10, seed=5)
    donor[9] = donor[4]
    found = approximate("common_interpolation", model, donor, donor[[2, 4]], k=5)
    torch.testing.assert_close(found[0], model[2])
    torch.testing.assert_close(found[1], (model[4] + model[9]) / 2)


def test_of_equally_near_ones_the_first_are_taken() -> None:
    model, donor = normal(8, 6, seed=6), normal(1, 10, seed=7).expand(8, 10).contiguous()
    for metric in ("euclidean", "cosine"):
        found = approximate("common_interpolation", model, donor, normal(1, 10, seed=8), k=3, metric=metric)
        torch.testing.assert_close(found[0], model[:3].mean(dim=0))


def test_cosines_that_are_not_positive_weigh_nothing() -> None:
    model = normal(3, 4, seed=9)
    donor = torch.tensor([[1.0, 0.0], [-1.0, 0.2], [0.0, 0.0]])
    found = approximate("common_interpolation", model, donor, torch.tensor([[2.0, 0.0]]), k=3, metric="cosine")
    torch.testing.assert_close(found[0], model[0])
    none = approximate("common_interpolation", model, donor, torch.tensor([[0.0, 0.0]]), k=2, metric="cosine")
    torch.testing.assert_close(none[0], model[:2].mean(dim=0))


@pytest.mark.parametrize("scheme", ["barycentric", "least_squares"])
def test_more_neighbours_than_dimensions_have_the_smallest_weights(scheme: str) -> None:
    model, donor, missing = normal(30, 5, seed=10), normal(30, 3, seed=11), normal(2, 3, seed=12)
    donor[4] = donor[3]
    found = approximate("common_interpolation", model, donor, missing, k=30, weights=scheme)
    assert torch.isfinite(found).all()
    assert found.abs().max() < 10 * model.abs().max()


def test_batches_do_not_matter() -> None:
    model, donor, missing = normal(3000, 8, seed=13), normal(3000, 96, seed=14), normal(33, 96, seed=15)
    for metric in ("euclidean", "cosine"):
        whole = approximate("common_interpolation", model, donor, missing, k=9, metric=metric, weights="least_squares")
        for batch in (1, 7):
            cut = approximate(
                "common_interpolation", model, donor, missing, k=9, metric=metric, weights="least_squares", batch=batch
            )
            assert torch.equal(cut, whole)


def test_what_is_not_finite() -> None:
    model, donor, missing = normal(20, 4, seed=16), normal(20, 6, seed=17), normal(2, 6, seed=18)
    missing[1, 0] = float("inf")
    found = approximate("common_interpolation", model, donor, missing, k=3)
    assert torch.isfinite(found[0]).all()
    assert found[1].isnan().all()
    donor[0, 0] = float("nan")
    assert approximate("common_interpolation", model, donor, missing, k=3).isnan().all()


@pytest.mark.parametrize("wrong", [{"k": 0}, {"metric": "manhattan"}, {"weights": "softmax"}, {"rank": 3}])
def test_parameters_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        approximate("common_interpolation", normal(3, 4), normal(3, 4), normal(1, 4), **wrong)  # type: ignore[arg-type] # wrong on purpose

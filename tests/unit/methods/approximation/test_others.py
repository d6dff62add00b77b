"""Rows that are drawn, constant, or mapped linearly; and what holds for all approximations."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from mergekit_ray.core.approximation import APPROXIMATIONS
from mergekit_ray.core.errors import ConfigError
from mergekit_ray.evaluation.noise import normal_numbers
from support.references.approximations import approximate, method
from support.waiting import DEADLINE_SECONDS

NAMES = ["common_interpolation", "john_hewitt", "landmark_pca", "mean", "omp", "randn", "zero"]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_names() -> None:
    assert APPROXIMATIONS.names() == NAMES
    with pytest.raises(ConfigError, match="unknown approximation 'ompp'; did you mean 'omp'"):
        method("ompp")


def test_declarations_are_read_without_torch() -> None:
    code = (
        "import sys; from mergekit_ray.core.approximation import APPROXIMATIONS as a; "
        "[a.get(n).working_bytes({}, 9, 9, 9) for n in a.names()]; assert not {'torch', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=DEADLINE_SECONDS)


@pytest.mark.parametrize("name", NAMES)
def test_each_says_what_it_is(name: str) -> None:
    found = APPROXIMATIONS.get(name)
    assert found.name == name
    assert found.summary.endswith(".")
    assert found.formula
    assert all(field.description for field in found.parameters.model_fields.values())


@pytest.mark.parametrize("name", NAMES)
def test_rows_do_not_depend_on_the_cut(name: str) -> None:
    model, donor, missing = normal(500, 18, seed=1), normal(500, 30, seed=2), normal(21, 30, seed=3)
    uses_donor = APPROXIMATIONS.get(name).uses_donor
    rest = {"donor": donor, "missing": missing} if uses_donor else {}
    whole = approximate(name, model, rows=21, **rest)  # type: ignore[arg-type] # options by name
    assert torch.equal(approximate(name, model, rows=21, batch=4, **rest), whole)  # type: ignore[arg-type] # options by name


def test_zero_and_mean() -> None:
    model = normal(3000, 7, seed=4, dtype=torch.bfloat16) + 3
    assert torch.equal(approximate("zero", model, rows=3), torch.zeros(3, 7))
    expected = model.double().mean(dim=0).float().expand(3, 7)
    torch.testing.assert_close(approximate("mean", model, rows=3), expected, rtol=1e-6, atol=0)


def test_randn_is_the_noise_of_its_key() -> None:
    found = approximate("randn", torch.zeros(1, 6), rows=4, key="one")
    np.testing.assert_array_equal(found, normal_numbers("one", 0, 24).reshape(4, 6).astype(np.float32))
    assert not torch.equal(found, approximate("randn", torch.zeros(1, 6), rows=4, key="two"))


def test_john_hewitt_has_the_moments_of_the_model() -> None:
    mixing = normal(5, 5, seed=5)
    model = normal(4000, 5, seed=6) @ mixing + torch.tensor([1.0, -2.0, 0.0, 4.0, 0.5])
    found = approximate("john_hewitt", model, rows=60_000).double()
    torch.testing.assert_close(found.mean(dim=0), model.double().mean(dim=0), rtol=0, atol=0.06)
    torch.testing.assert_close(found.t().cov(), model.double().t().cov(), rtol=0.05, atol=0.05)


def test_john_hewitt_keeps_to_the_span_of_few_rows() -> None:
    """Fewer rows than dimensions: the covariance is singular."""
    model = normal(4, 12, seed=7)
    found = approximate("john_hewitt", model, rows=9).double() - model.double().mean(dim=0)
    basis = torch.linalg.svd(model.double() - model.double().mean(dim=0), full_matrices=False).Vh[:3]
    torch.testing.assert_close(found @ basis.t() @ basis, found, rtol=0, atol=1e-5)


def test_landmark_pca_finds_a_linear_map() -> None:
    donor, missing, matrix = normal(90, 8, seed=8), normal(6, 8, seed=9), normal(8, 11, seed=10)
    shift = normal(11, seed=11)
    found = approximate("landmark_pca", donor @ matrix + shift, donor, missing)
    torch.testing.assert_close(found, missing @ matrix + shift, rtol=0, atol=1e-4)


def test_landmark_pca_is_least_squares_with_an_intercept() -> None:
    model, donor, missing = normal(200, 9, seed=12) + 2, normal(200, 13, seed=13) - 1, normal(5, 13, seed=14)
    ones = torch.ones(200, 1, dtype=torch.float64)
    solution = np.linalg.lstsq(torch.cat([donor.double(), ones], dim=1).numpy(), model.double().numpy(), rcond=None)[0]
    expected = missing.double().numpy() @ solution[:-1] + solution[-1]
    np.testing.assert_allclose(approximate("landmark_pca", model, donor, missing), expected, atol=1e-5)


def test_landmark_pca_of_fewer_tokens_than_dimensions_stays_small() -> None:
    model, donor, missing = normal(5, 9, seed=15), normal(5, 30, seed=16), normal(3, 30, seed=17)
    found = approximate("landmark_pca", model, donor, missing)
    assert found.abs().max() < 5 * model.abs().max()
    torch.testing.assert_close(approximate("landmark_pca", model, donor, donor), model, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["john_hewitt", "landmark_pca", "mean"])
def test_what_is_not_finite_shows(name: str) -> None:
    model, donor, missing = normal(20, 4, seed=18), normal(20, 6, seed=19), normal(2, 6, seed=20)
    model[3, 1] = float("nan")
    uses_donor = APPROXIMATIONS.get(name).uses_donor
    rest = {"donor": donor, "missing": missing} if uses_donor else {}
    assert approximate(name, model, rows=2, **rest).isnan().any(dim=1).all()  # type: ignore[arg-type] # options by name

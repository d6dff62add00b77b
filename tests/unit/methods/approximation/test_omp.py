"""Orthogonal matching pursuit, against scikit-learn's and a reference in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mergekit_ray.methods.compiled import pursuit as loops
from mergekit_ray.methods.shared import pursuit as driver
from mergekit_ray.methods.shared.pursuit import Combinations, Screen, fastest_dtype, pursuit, squared_norms
from mergekit_ray.methods.shared.stored_rows import Rows
from support.references import approximations as reference
from support.references.approximations import approximate


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pursued(atoms: torch.Tensor, targets: torch.Tensor, k: int, **options: Any) -> Combinations:
    rows = Rows.of(atoms)
    return pursuit(rows, float(squared_norms(rows).max()) ** 0.5, targets, k, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("k", [1, 5, 24])
def test_like_the_reference(dtype: torch.dtype, k: int) -> None:
    model, donor, missing = normal(300, 20, seed=1), normal(300, 32, seed=2, dtype=dtype), normal(17, 32, seed=3)
    found = approximate("omp", model, donor, missing, k=k)
    for x, row in zip(missing.double().numpy(), found.double().numpy(), strict=True):
        chosen, coefficients = reference.pursuit(x, donor.double().numpy(), k)
        np.testing.assert_allclose(row, coefficients @ model.double().numpy()[chosen], rtol=0, atol=2e-5)


def test_like_scikit_learn() -> None:
    """What its `orthogonal_mp` made of atoms of length one, with 6 of them.

    It is not installed for tests: numba would import scipy with it.
    """
    recorded = json.loads((Path(__file__).parent / "scikit_learn.json").read_text())
    found = pursued(torch.tensor(recorded["atoms"]), torch.tensor(recorded["targets"]), 6)
    for i, (chosen, coefficients) in enumerate(zip(recorded["chosen"], recorded["coefficients"], strict=True)):
        order = found.picked[i].argsort()
        assert found.picked[i][order].tolist() == chosen
        np.testing.assert_allclose(found.coefficients[i][order], coefficients, rtol=1e-6)


def test_a_token_of_few_others_is_made_of_exactly_those() -> None:
    model, donor = normal(60, 8, seed=6), torch.linalg.qr(normal(64, 64, seed=7)).Q[:60].contiguous()
    mixture = 3.0 * donor[5] - 2.0 * donor[41] + 0.5 * donor[17]
    found = approximate("omp", model, donor, mixture[None], k=40)
    torch.testing.assert_close(found[0], 3.0 * model[5] - 2.0 * model[41] + 0.5 * model[17], rtol=0, atol=1e-5)
    assert pursued(donor, mixture[None], 40).sizes[0] < 10, "it ends where only rounding is left"


def test_a_shared_row_comes_out_as_it_is() -> None:
    model, donor = normal(50, 8, seed=8, dtype=torch.bfloat16), normal(50, 16, seed=9)
    found = approximate(
        "omp",
        model,
        3.0 * donor / donor.norm(dim=1, keepdim=True),
        6.0 * donor[:4] / donor[:4].norm(dim=1, keepdim=True),
    )
    torch.testing.assert_close(found, 2.0 * model[:4].float(), rtol=0, atol=1e-5)


def test_equal_atoms_go_to_the_first() -> None:
    donor = normal(900, 16, seed=10)
    donor[:] = donor[0]
    donor[1] = normal(16, seed=11)
    target = (donor[0] + 0.1 * donor[1])[None]
    for dtype in (torch.float32, torch.bfloat16):
        found = pursued(donor, target, 5, dtype=dtype)  # more equals than there is room for
        assert found.picked[0, : found.sizes[0]].tolist() == [0, 1]


def test_one_row_more_than_dimensions_ends() -> None:
    """The last atoms are in the span of the first: their coefficients would be anything."""
    model, donor, missing = normal(30, 5, seed=12), normal(30, 4, seed=13), normal(6, 4, seed=14)
    found = pursued(donor, missing, 30)
    assert (found.sizes <= 4).all()
    assert np.abs(found.coefficients).max() < 100
    assert torch.isfinite(approximate("omp", model, donor, missing, k=30)).all()


@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neither_batches_nor_precision_change_a_bit(
    batch: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, missing = normal(5000, 24, seed=15), normal(40, 200, seed=16)
    donor = normal(5000, 200, seed=17, dtype=torch.bfloat16)
    expected = approximate("omp", model, donor, missing, k=16)
    monkeypatch.setattr(driver, "fastest_dtype", lambda: dtype)
    assert torch.equal(approximate("omp", model, donor, missing, k=16, batch=batch), expected)


def test_the_screen_is_as_rough_as_it_says() -> None:
    """Of other scales, too; and for rows that are not normal numbers."""
    for seed, scale in enumerate((1e-20, 1.0, 1e15)):
        x, a = scale * normal(20, 500, seed=seed), normal(300, 500, seed=100 + seed).exp()
        for stored in (a, a.bfloat16()):
            rows = Rows.of(stored)
            exact = (x.double() @ stored.double().t()).abs()
            norms = x.double().norm(dim=1)[:, None] * stored.double().norm(dim=1)[None]
            for dtype in (torch.float32, torch.bfloat16):
                screen = Screen.of(rows, dtype)
                rough = screen.products(x.to(dtype), rows.data, torch.empty(20 * 300)).double().abs()
                assert ((rough - exact).abs() <= screen.error * norms + screen.share * exact).all()


def test_a_library_that_errs_more_than_it_may_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    donor, missing = normal(300, 32, seed=18), normal(5, 32, seed=19)
    expected = pursued(donor, missing, 8)

    def wrong(self: Screen, residuals: torch.Tensor, atoms: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        return (residuals.float() @ atoms.float().t()).flip(1).contiguous()

    monkeypatch.setattr(Screen, "products", wrong)
    found = pursued(donor, missing, 8)
    assert (found.picked == expected.picked).all()
    assert (found.coefficients == expected.coefficients).all()


def test_zeros_and_what_is_not_finite() -> None:
    model, donor, missing = normal(40, 6, seed=20), normal(40, 8, seed=21), normal(3, 8, seed=22)
    missing[1] = 0.0
    missing[2, 3] = float("nan")
    found = approximate("omp", model, donor, missing, k=4)
    assert torch.isfinite(found[0]).all()
    assert (found[1] == 0).all()
    assert found[2].isnan().all()
    donor[7, 0] = float("inf")
    assert approximate("omp", model, donor, missing, k=4).isnan().all()


def test_fewer_tokens_than_k() -> None:
    model, donor, missing = normal(3, 6, seed=23), normal(3, 8, seed=24), normal(2, 8, seed=25)
    found = approximate("omp", model, donor, missing, k=64)
    for x, row in zip(missing.double().numpy(), found.double().numpy(), strict=True):
        solution = np.linalg.lstsq(donor.double().numpy().T, x, rcond=None)[0]
        np.testing.assert_allclose(row, solution @ model.double().numpy(), atol=1e-5)


def test_k_is_at_least_one() -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        approximate("omp", normal(3, 4), normal(3, 4), normal(1, 4), k=0)


def test_scan_keeps_what_may_be_the_best() -> None:
    found = torch.tensor([[1.0, -5.0, 4.95, 2.0, 5.01, -4.8]]).numpy()
    candidates = loops.Candidates(
        np.array([0.05]), np.zeros(1), np.zeros(1, np.int64), np.zeros((1, 4), np.int64), np.zeros((1, 4))
    )
    loops.scan(found, 10, 0.0, candidates)
    assert candidates.largest[0] == pytest.approx(5.01)
    noted = candidates.indices[0, : candidates.counts[0]].tolist()
    assert set(noted) >= {11, 12, 14}
    assert noted == sorted(noted)


def test_the_fastest_is_one_of_two() -> None:
    assert fastest_dtype() in (torch.float32, torch.bfloat16)

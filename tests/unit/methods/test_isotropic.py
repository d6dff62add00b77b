"""Iso-C and Iso-CTS against full SVDs in float64, and the cases that their papers leave open."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_ray.core.declaration import Access, BaseUse
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.isotropic import directions_per_task
from mergekit_ray.methods.shared import spectral
from mergekit_ray.methods.shared.spectral import TaskMatrices, polar_factor, spectrum
from support.operands import MemoryOperands
from support.references import paper as reference
from support.references.merge import Array, Expected
from support.references.paper import as_float64, evaluated, random_models

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAMES = ["iso_c", "iso_cts"]
MATRICES = [(1, 1), (6, 6), (40, 12), (12, 40), (1, 9), (9, 1), (30, 29)]


def whole(name: str, xs: list[torch.Tensor], base: torch.Tensor) -> torch.Tensor:
    """The method by itself, with its defaults, on the very tensors."""
    method = METHODS.get(name)()
    assert isinstance(method, spectral.SpectralMethod)
    operands = MemoryOperands(
        xs,
        base,
        parameters=method.global_parameters(),
        input_parameters=[method.model_parameters()] * len(xs),
        compute_dtype=base.dtype,
    )
    return method.combine_whole(xs, base, operands)


def expected(name: str, xs: Any, base: Any, weights: Any, scale: float = 1.0, fraction: float = 0.8) -> Expected:
    b = as_float64(base)
    deltas = [w * (as_float64(x) - b) for x, w in zip(xs, weights, strict=True)]
    if b.ndim != 2:
        change = sum(deltas) / len(deltas)
    else:
        change = reference.iso_c(deltas) if name == "iso_c" else reference.iso_cts(deltas, fraction)
    value = b + scale * change
    # float64 throughout: what is left of an error is one rounding to float32, on top of that of the output.
    return Expected(value, np.abs(value), np.ones_like(b, dtype=bool))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formula(name: str, dtype: torch.dtype) -> None:
    for shape in [*MATRICES, (), (7,), (3, 5, 7), (1,)]:
        for weights in ([1.0, 1.0, 1.0], [0.3, -0.8, 1.5], [0.7]):
            xs, base = random_models(shape, len(weights), dtype)
            given_weights = [{"weight": weight} for weight in weights]
            result = evaluated(name, xs, base, {"lambda": 0.7}, given_weights)
            assert result.dtype == dtype
            assert result.shape == shape
            expected(name, xs, base, weights, scale=0.7).check(result, roundings=2)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(24, 17), (17, 24)], ids=str)
def test_shares_of_the_common_space(fraction: float, shape: tuple[int, ...]) -> None:
    xs, base = random_models(shape, 3)
    result = evaluated("iso_cts", xs, base, {"common_space_fraction": fraction})
    expected("iso_cts", xs, base, [1.0] * 3, fraction=fraction).check(result, roundings=2)


def test_all_directions_common_is_iso_c() -> None:
    xs, base = random_models((11, 19), 3)
    assert torch.equal(evaluated("iso_cts", xs, base, {"common_space_fraction": 1.0}), evaluated("iso_c", xs, base))


def test_the_spectrum_is_flat() -> None:
    xs, base = random_models((50, 20), 4)
    for name in NAMES:
        merged = as_float64(evaluated(name, xs, base, out_dtype=torch.float64, compute_dtype=torch.float64))
        values = np.linalg.svd(merged - as_float64(base), compute_uv=False)
        assert np.ptp(values) < 1e-12 * values.max()


@pytest.mark.parametrize(
    ("rank", "tasks", "fraction", "share"),
    [
        (10, 2, 0.8, 1),
        (10, 3, 0.8, 1),
        (10, 8, 0.8, 0),
        (768, 8, 0.8, 19),
        (3, 2, 0.0, 1),
        (3, 5, 0.0, 0),
        (9, 2, 0.5, 2),
    ],
)
def test_directions_per_task(rank: int, tasks: int, fraction: float, share: int) -> None:
    assert directions_per_task(rank, tasks, fraction) == share


@given(rank=st.integers(1, 10_000), tasks=st.integers(1, 50), fraction=st.floats(0, 1))
def test_directions_always_fit(rank: int, tasks: int, fraction: float) -> None:
    assert 0 <= tasks * directions_per_task(rank, tasks, fraction) <= rank


@pytest.mark.parametrize("shape", [(30, 8), (8, 30), (20, 20)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_low_rank_leaves_the_other_directions_alone(name: str, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.zeros(shape)
    # Products of small integers are exact: the rank is 2 + 2 to the last bit.
    factors = [[torch.randint(-3, 4, (n, 2), generator=generator).float() for n in shape] for _ in range(2)]
    xs = [a @ b.T for a, b in factors]
    result = evaluated(name, xs, base)
    expected(name, xs, base, [1.0, 1.0]).check(result, roundings=4)
    assert np.linalg.matrix_rank(as_float64(result), tol=1e-4) == 4


def test_a_badly_conditioned_sum() -> None:
    """Singular values over eight orders of magnitude: a Gram matrix would have lost the smaller half."""
    rng = np.random.default_rng(4)
    u, v = (np.linalg.qr(rng.standard_normal((rows, 20)))[0] for rows in (30, 20))
    x = torch.from_numpy(u * np.logspace(0, -8, 20) @ v.T)
    result = evaluated("iso_c", [x], torch.zeros_like(x), compute_dtype=torch.float64)
    assert np.abs(as_float64(result) - np.logspace(0, -8, 20).mean() * u @ v.T).max() < 1e-8


@pytest.mark.parametrize("name", NAMES)
def test_models_equal_to_the_base_leave_it(name: str) -> None:
    for shape in [*MATRICES, (5,), ()]:
        _, base = random_models(shape, 1)
        assert torch.equal(evaluated(name, [base] * 3, base), base)
        assert torch.equal(evaluated(name, [torch.zeros(shape)] * 2, torch.zeros(shape)), torch.zeros(shape))


def test_opposite_models_cancel() -> None:
    xs, base = random_models((9, 13), 1, size=2.0)
    opposite = 2 * base.double() - xs[0].double()
    for xs_, weights in ([xs[0].double(), opposite], [1.0, 1.0]), ([xs[0].double()] * 2, [0.5, -0.5]):
        result = evaluated(
            "iso_c", xs_, base.double(), None, [{"weight": w} for w in weights], compute_dtype=torch.float64
        )
        assert torch.equal(result, base.double())


def test_equal_models_are_one_of_their_sum() -> None:
    xs, base = random_models((9, 13), 1)
    three = evaluated("iso_c", xs * 3, base)
    expected("iso_c", xs, base, [3.0]).check(three, roundings=2)
    # Their own directions are all in the common space, so nothing is left to each of them.
    result = evaluated("iso_cts", xs * 3, base, {"common_space_fraction": 1.0})
    assert torch.equal(result, three)


@pytest.mark.parametrize("name", NAMES)
def test_lambda_zero_is_the_base(name: str) -> None:
    xs, base = random_models((9, 13), 2)
    assert torch.equal(evaluated(name, xs, base, {"lambda": 0.0}), base)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(6, 4), (5,)], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("parameters", [{}, {"lambda": 0.0}], ids=str)
def test_non_finite_inputs_show(name: str, shape: tuple[int, ...], bad: float, parameters: dict[str, float]) -> None:
    for place in range(3):
        xs, base = random_models(shape, 2)
        [*xs, base][place].view(-1)[1] = bad
        with pytest.raises(MergeError, match="flat index 1"):
            evaluated(name, xs, base, parameters)
        merged = evaluated(name, xs, base, parameters, allow_non_finite=True)
        if len(shape) == 2 and not parameters:
            assert merged.isnan().all()
        else:
            assert (~merged.isfinite()).nonzero().tolist() == [list(np.unravel_index(1, shape))]


@pytest.mark.parametrize("name", NAMES)
def test_empty_tensors(name: str) -> None:
    for shape in [(0, 5), (5, 0), (0,)]:
        empty = torch.empty(shape)
        assert whole(name, [empty], empty).shape == shape
        assert evaluated(name, [empty], empty).shape == shape


@pytest.mark.parametrize("name", NAMES)
def test_same_bytes_for_any_cut_and_number_of_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral, "RUN_ELEMENTS", 3000)
    xs, base = random_models((1100, 30), 2, torch.bfloat16)
    first = evaluated(name, xs, base, out_dtype=torch.float32)
    for num_threads, chunk_elements in ((2, 1 << 16), (1, 1000), (2, 77)):
        again = evaluated(
            name, xs, base, out_dtype=torch.float32, num_threads=num_threads, chunk_elements=chunk_elements
        )
        assert torch.equal(first, again)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(300, 20), (20, 300)], ids=str)
def test_many_runs_of_rows(name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral, "RUN_ELEMENTS", 640)
    xs, base = random_models(shape, 3)
    expected(name, xs, base, [1.0] * 3).check(evaluated(name, xs, base), roundings=2)


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_not_changed(name: str) -> None:
    xs, base = random_models((12, 7), 2, torch.float64)
    before = [x.clone() for x in (*xs, base)]
    for shape in ((12, 7), (7, 12), (84,)):
        whole(name, [x.view(shape) for x in xs], base.view(shape))
    assert all(torch.equal(x, y) for x, y in zip((*xs, base), before, strict=True))


def test_polar_factor_is_the_nearest_orthonormal_matrix() -> None:
    x = torch.randn(20, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    factor = polar_factor(x)
    assert torch.allclose(factor.T @ factor, torch.eye(6, dtype=torch.float64), atol=1e-13)
    # x = factor · H with H symmetric and positive
    symmetric = factor.T @ x
    assert torch.allclose(symmetric, symmetric.T, atol=1e-13)
    assert torch.linalg.eigvalsh(symmetric).min() > 0


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 12),
    rank=st.integers(0, 6),
    step=st.integers(1, 17),
    seed=st.integers(0, 99),
)
def test_spectrum_of_runs(rows: int, columns: int, rank: int, step: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x: Array = rng.integers(-3, 4, (rows, rank)) @ rng.integers(-3, 4, (rank, columns)).astype(float)
    runs = [torch.from_numpy(x[start : start + step]) for start in range(0, rows, step)]
    found = spectrum(iter(runs))
    true = np.linalg.svd(x, compute_uv=False)
    size = max(true.max(initial=0.0), 1.0)
    assert (
        np.abs(np.sort(found.values.numpy())[::-1][: len(true)] - true[: len(found.values)]).max(initial=0)
        < 1e-12 * size
    )
    assert int((found.values > 0).sum()) == np.linalg.matrix_rank(x)
    left = torch.from_numpy(x) @ found.to_left
    assert torch.allclose(left * found.values @ found.right.T, torch.from_numpy(x), atol=1e-12 * size)
    assert np.abs(x @ found.whitening.numpy() - reference.polar(x)).max() < 1e-11


def test_tall_or_transposed() -> None:
    tall = TaskMatrices.tall([torch.ones(3, 5)], torch.zeros(3, 5), [2.0])
    assert tall.is_transposed
    assert tall.num_columns == 3
    assert torch.equal(tall.rows(1, 3)[0], torch.full((2, 3), 2.0, dtype=torch.float64))
    assert not TaskMatrices.tall([torch.ones(5, 3)], torch.zeros(5, 3), [1.0]).is_transposed


@pytest.mark.parametrize("name", NAMES)
def test_declaration(name: str) -> None:
    declaration = METHODS.get(name)
    assert declaration.name == name
    assert declaration.summary.endswith(".")
    assert declaration.formula
    assert declaration.base is BaseUse.REQUIRED
    assert declaration.access is Access.WHOLE
    assert declaration.propagates_non_finite
    names = {"weight": "model", "lambda": "global"} | ({"common_space_fraction": "global"} if name == "iso_cts" else {})
    assert declaration.parameter_names() == names
    assert declaration.model_parameters().model_dump() == {"weight": 1.0}
    for model in (declaration.model_parameters, declaration.global_parameters):
        assert all(field.description for field in model.model_fields.values())

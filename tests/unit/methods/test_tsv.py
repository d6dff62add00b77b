"""TSV-Merge against full SVDs in float64, and the cases that its paper leaves open."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from mergekit_ray.core.declaration import Access, BaseUse
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared import spectral
from support.references import paper as reference
from support.references.merge import Expected
from support.references.paper import as_float64, evaluated, random_models

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (6, 6), (40, 12), (12, 40), (1, 9), (9, 1), (2, 9), (31, 29), (), (7,), (3, 5, 7)]


def expected(xs: Sequence[torch.Tensor], base: torch.Tensor, weights: Sequence[float], scale: float = 1.0) -> Expected:
    b = as_float64(base)
    deltas = [w * (as_float64(x) - b) for x, w in zip(xs, weights, strict=True)]
    change = reference.tsv_m(deltas) if b.ndim == 2 else sum(deltas) / len(deltas)
    value = b + scale * change
    return Expected(value, np.abs(value), np.ones_like(b, dtype=bool))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, -0.8), (0.7,), (1.0, 0.0, 0.5, 2.0)], ids=str)
def test_formula(weights: tuple[float, ...], dtype: torch.dtype) -> None:
    for shape in SHAPES:
        xs, base = random_models(shape, len(weights), dtype)
        result = evaluated("tsv_m", xs, base, {"lambda": 0.7}, [{"weight": weight} for weight in weights])
        assert result.dtype == dtype
        assert result.shape == shape
        expected(xs, base, weights, scale=0.7).check(result, roundings=2)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (12, 12)], ids=str)
def test_float64_arithmetic(shape: tuple[int, int]) -> None:
    xs, base = random_models(shape, 3, torch.float64)
    result = evaluated("tsv_m", xs, base, compute_dtype=torch.float64)
    assert np.abs(as_float64(result) - expected(xs, base, [1.0] * 3).value).max() < 1e-12


@pytest.mark.parametrize("shape", [(14, 9), (9, 14)], ids=str)
def test_one_model_is_itself(shape: tuple[int, int]) -> None:
    """All directions are kept, and they are orthogonal."""
    xs, base = random_models(shape, 1, torch.float64)
    result = evaluated("tsv_m", xs, base, compute_dtype=torch.float64)
    assert torch.allclose(result, xs[0], rtol=0, atol=1e-13)


def test_orthogonal_tasks_are_added() -> None:
    """Nothing interferes: each comes out as its low-rank part, which is all of it."""
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((10, 10)))
    p, _ = np.linalg.qr(np.random.default_rng(1).standard_normal((14, 14)))
    deltas = [
        torch.from_numpy(q[:, :5] * np.arange(9, 4, -1.0) @ p[:, :5].T),
        torch.from_numpy(q[:, 5:] * np.arange(3.5, 1, -0.5) @ p[:, 5:10].T),
    ]
    base = torch.ones(10, 14, dtype=torch.float64)
    result = evaluated("tsv_m", [base + delta for delta in deltas], base, compute_dtype=torch.float64)
    assert torch.allclose(result, base + deltas[0] + deltas[1], rtol=0, atol=1e-12)


def test_equal_models_give_their_low_rank_part() -> None:
    xs, base = random_models((13, 8), 1, torch.float64)
    u, s, vt = np.linalg.svd(as_float64(xs[0] - base), full_matrices=False)
    for count in (2, 3, 4):
        rank = 8 // count
        result = evaluated("tsv_m", xs * count, base, compute_dtype=torch.float64)
        low_rank = u[:, :rank] * s[:rank] @ vt[:rank]
        assert np.abs(as_float64(result - base) - low_rank).max() < 1e-12


def test_a_model_equal_to_the_base_disturbs_nobody() -> None:
    xs, base = random_models((13, 8), 1, torch.float64)
    u, s, vt = np.linalg.svd(as_float64(xs[0] - base), full_matrices=False)
    for models in ([xs[0], base], [base, xs[0]]):
        result = evaluated("tsv_m", models, base, compute_dtype=torch.float64)
        assert np.abs(as_float64(result - base) - u[:, :4] * s[:4] @ vt[:4]).max() < 1e-12


def test_opposite_models_cancel() -> None:
    xs, base = random_models((6, 9), 1, torch.float64)
    base.zero_()
    result = evaluated("tsv_m", [xs[0], -xs[0]], base, compute_dtype=torch.float64)
    assert result.abs().max() < 1e-14


def test_low_rank_tasks() -> None:
    """Of rank below their share, as LoRA's: what is zero takes no part."""
    generator = torch.Generator().manual_seed(3)
    for shape in [(30, 20), (20, 30)]:
        xs = [
            torch.randn(shape[0], 2, generator=generator) @ torch.randn(2, shape[1], generator=generator)
            for _ in range(3)
        ]
        xs = [(x * 64).round() / 64 for x in xs]  # nearly of rank 2, and exactly what is stored
        exact = [torch.randint(-3, 4, (n, 2), generator=generator).double() for n in shape]
        xs[0] = (exact[0] @ exact[1].T).float()
        base = torch.zeros(shape)
        expected(xs, base, [1.0] * 3).check(evaluated("tsv_m", xs, base), roundings=4)


def test_models_equal_to_the_base_leave_it() -> None:
    for shape in SHAPES:
        _, base = random_models(shape, 1)
        assert torch.equal(evaluated("tsv_m", [base] * 3, base), base)
        assert torch.equal(evaluated("tsv_m", [torch.zeros(shape)], torch.zeros(shape)), torch.zeros(shape))


def test_order_of_models_does_not_matter() -> None:
    xs, base = random_models((15, 11), 3, torch.bfloat16)
    assert torch.equal(evaluated("tsv_m", xs, base), evaluated("tsv_m", xs[::-1], base))


def test_empty_tensors() -> None:
    for shape in [(0, 5), (5, 0), (0,)]:
        assert evaluated("tsv_m", [torch.empty(shape)], torch.empty(shape)).shape == shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_inputs_show(bad: float) -> None:
    for place in range(3):
        xs, base = random_models((5, 4), 2)
        [*xs, base][place].view(-1)[7] = bad
        with pytest.raises(MergeError, match="flat index 7"):
            evaluated("tsv_m", xs, base)
        assert evaluated("tsv_m", xs, base, allow_non_finite=True).isnan().all()


def test_same_bytes_for_any_cut_and_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral, "RUN_ELEMENTS", 2560)
    xs, base = random_models((40, 900), 3, torch.bfloat16)
    first = evaluated("tsv_m", xs, base, out_dtype=torch.float32)
    expected(xs, base, [1.0] * 3).check(first, roundings=2)
    for num_threads, chunk_elements in ((2, 1 << 16), (2, 77)):
        again = evaluated(
            "tsv_m", xs, base, out_dtype=torch.float32, num_threads=num_threads, chunk_elements=chunk_elements
        )
        assert torch.equal(first, again)


def test_declaration() -> None:
    declaration = METHODS.get("tsv_m")
    assert declaration.name == "tsv_m"
    assert declaration.summary.endswith(".")
    assert declaration.base is BaseUse.REQUIRED
    assert declaration.access is Access.WHOLE
    assert declaration.propagates_non_finite
    assert declaration.parameter_names() == {"weight": "model", "lambda": "global"}
    assert declaration.global_parameters().model_dump(by_alias=True) == {"lambda": 1.0}

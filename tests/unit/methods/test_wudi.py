"""WUDI-Merging against Adam in float64 numpy, and against what it minimises."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mergekit_ray.core.declaration import Access, BaseUse
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.shared import spectral
from support.references import paper as reference
from support.references.merge import Array, ulp
from support.references.paper import as_float64, evaluated, random_models

SHAPES = [(1, 1), (6, 6), (20, 9), (9, 20), (1, 9), (9, 1)]


def task_vectors(xs: Sequence[torch.Tensor], base: torch.Tensor, weights: Sequence[float]) -> list[Array]:
    return [w * (as_float64(x) - as_float64(base)) for x, w in zip(xs, weights, strict=True)]


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.3, -0.8), (1.0, 0.0, 0.5)], ids=str)
@pytest.mark.parametrize("steps", [0, 1, 40])
def test_formula_in_float64(weights: tuple[float, ...], steps: int) -> None:
    for shape in SHAPES:
        xs, base = random_models(shape, len(weights), torch.float64)
        parameters = {"lambda": 0.7, "steps": steps, "learning_rate": 1e-3}
        result = evaluated("wudi", xs, base, parameters, [{"weight": w} for w in weights], compute_dtype=torch.float64)
        merged = reference.wudi(task_vectors(xs, base, weights), steps, 1e-3)
        # One model that changed, of any weight, is the minimum: there the reference's gradient is rounding.
        assert np.abs(as_float64(result) - as_float64(base) - 0.7 * merged).max() < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_arithmetic(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """As far from float64 as a learning rate, where a gradient is all rounding, and mostly much nearer."""
    xs, base = random_models(shape, 3, dtype, size=0.01)
    result = evaluated("wudi", xs, base, {"steps": 30})
    assert result.dtype == dtype
    assert result.shape == shape
    merged = as_float64(base) + reference.wudi(task_vectors(xs, base, [1.0] * 3), 30, 1e-5)
    errors = np.abs(as_float64(result) - merged) - ulp(merged, dtype)
    assert errors.max() < 2e-5
    assert np.median(errors) <= 0


def test_the_loss_falls() -> None:
    xs, base = random_models((20, 12), 3, torch.float64, size=0.02)
    deltas = task_vectors(xs, base, [1.0] * 3)
    losses = [
        reference.wudi_loss(
            as_float64(evaluated("wudi", xs, base, {"steps": steps}, compute_dtype=torch.float64) - base), deltas
        )
        for steps in (0, 100, 300)
    ]
    assert losses[2] < losses[1] < losses[0]


def test_gradient_of_the_reference() -> None:
    """The closed form that both use, against automatic differentiation of the loss."""
    deltas = [np.random.default_rng(seed).standard_normal((4, 6)) for seed in range(3)]
    tensors = [torch.from_numpy(delta) for delta in deltas]
    merged = torch.zeros(4, 6, dtype=torch.float64).add_(tensors[0], alpha=0.5).requires_grad_()
    loss = sum((((merged - d) @ d.T) ** 2).sum() / (d * d).sum() for d in tensors)
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    assert merged.grad is not None
    assert np.allclose(reference.wudi_gradient(as_float64(merged), deltas), as_float64(merged.grad), atol=1e-12)
    assert reference.wudi_loss(as_float64(merged), deltas) == pytest.approx(loss.item())


def test_tasks_whose_rows_are_orthogonal_are_added() -> None:
    """Their sum has no loss: there is nothing to descend."""
    base = torch.zeros(6, 10)
    xs = [torch.zeros(6, 10), torch.zeros(6, 10)]
    xs[0][:, :5] = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    xs[1][:, 5:] = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    result = evaluated("wudi", [x.double() for x in xs], base.double(), compute_dtype=torch.float64)
    assert torch.allclose(result, (xs[0] + xs[1]).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(12, 7), (7,)], ids=str)
def test_one_changed_model_is_itself(shape: tuple[int, ...]) -> None:
    xs, base = random_models(shape, 1, torch.bfloat16)
    assert torch.equal(evaluated("wudi", xs, base), xs[0])
    if len(shape) == 2:
        assert torch.equal(evaluated("wudi", [base, xs[0], base], base), xs[0])


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5, 2)], ids=str)
def test_what_is_not_a_matrix_is_averaged(shape: tuple[int, ...]) -> None:
    xs, base = random_models(shape, 3)
    result = evaluated("wudi", xs, base, {"lambda": 0.7}, [{"weight": w} for w in (1.0, 0.5, -2.0)])
    value = as_float64(base) + 0.7 / 3 * np.asarray(sum(task_vectors(xs, base, (1.0, 0.5, -2.0))))
    assert (np.abs(as_float64(result) - value) <= ulp(value, torch.float32)).all()


def test_models_equal_to_the_base_leave_it() -> None:
    for shape in [*SHAPES, (), (5,)]:
        _, base = random_models(shape, 1)
        assert torch.equal(evaluated("wudi", [base] * 3, base), base)
        assert torch.equal(evaluated("wudi", [torch.zeros(shape)], torch.zeros(shape)), torch.zeros(shape))


def test_opposite_models_cancel() -> None:
    """The sum, 0, is where the gradient of two of one norm vanishes."""
    xs, base = random_models((6, 9), 1)
    base.zero_()
    assert evaluated("wudi", [xs[0], -xs[0]], base, {"steps": 50}).abs().max() == 0


def test_equal_models_approach_the_model() -> None:
    """From three times the model's change, 10 steps of 0.01 towards it."""
    base = torch.zeros(8, 8, dtype=torch.float64)
    x = torch.eye(8, dtype=torch.float64)
    result = evaluated("wudi", [x] * 3, base, {"steps": 10, "learning_rate": 0.01}, compute_dtype=torch.float64)
    assert torch.allclose(result, 3 * x - 0.1 * x, atol=2e-3)


def test_empty_tensors() -> None:
    for shape in [(0, 5), (5, 0), (0,)]:
        assert evaluated("wudi", [torch.empty(shape)], torch.empty(shape)).shape == shape


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_inputs_show(bad: float, steps: int) -> None:
    for place in range(3):
        xs, base = random_models((5, 4), 2)
        [*xs, base][place].view(-1)[7] = bad
        with pytest.raises(MergeError, match="flat index 7"):
            evaluated("wudi", xs, base, {"steps": steps})
        assert evaluated("wudi", xs, base, {"steps": steps}, allow_non_finite=True).isnan().all()


def test_same_bytes_for_any_cut_and_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral, "RUN_ELEMENTS", 1280)
    xs, base = random_models((300, 20), 3, torch.bfloat16, size=0.01)
    first = evaluated("wudi", xs, base, {"steps": 20}, out_dtype=torch.float32)
    merged = as_float64(base) + reference.wudi(task_vectors(xs, base, [1.0] * 3), 20, 1e-5)
    assert np.abs(as_float64(first) - merged).max() < 2e-5
    for num_threads, chunk_elements in ((2, 1 << 16), (2, 77)):
        again = evaluated(
            "wudi",
            xs,
            base,
            {"steps": 20},
            out_dtype=torch.float32,
            num_threads=num_threads,
            chunk_elements=chunk_elements,
        )
        assert torch.equal(first, again)


def test_declaration() -> None:
    declaration = METHODS.get("wudi")
    assert declaration.name == "wudi"
    assert declaration.summary.endswith(".")
    assert declaration.base is BaseUse.REQUIRED
    assert declaration.access is Access.WHOLE
    assert declaration.propagates_non_finite
    assert declaration.parameter_names() == {
        "weight": "model",
        "lambda": "global",
        "steps": "global",
        "learning_rate": "global",
    }
    assert declaration.global_parameters().model_dump(by_alias=True) == {
        "lambda": 1.0,
        "steps": 300,
        "learning_rate": 1e-5,
    }
    for wrong in ({"steps": -1}, {"steps": 1.5}, {"learning_rate": -1e-5}, {"learning_rate": float("nan")}):
        with pytest.raises(ValidationError):
            declaration.global_parameters.model_validate(wrong)

from __future__ import annotations

import pytest
import torch

from mergekit_ray.core.declaration import Access
from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.dare import DareLinear
from support.operands import MemoryOperands, merge


def tensors(size: int = 300_000) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(size, generator=generator)
    return base, base + 0.1 * torch.randn(size, generator=generator)


def change(base: torch.Tensor, x: torch.Tensor, density: float, key: str = "k", **parameters: float) -> torch.Tensor:
    merged = merge(
        "dare_linear",
        [x.double()],
        base.double(),
        parameters=parameters,
        input_parameters=[{"weight": 1.0, "density": density}],
        keys=[key],
        compute_dtype=torch.float64,
    )
    return merged - base.double()


def test_rescaling_restores_the_l1_norm() -> None:
    base, x = tensors()
    before = (x.double() - base.double()).abs().sum()
    assert float(change(base, x, 0.2).abs().sum()) == pytest.approx(float(before), rel=1e-9)
    assert float(change(base, x, 0.2, rescale=0).abs().sum()) == pytest.approx(0.2 * float(before), rel=0.01)


def test_every_model_and_tensor_has_its_own_mask() -> None:
    base, x = tensors(20_000)
    masks = [change(base, x, 0.5, key) != 0 for key in ("1/a/m", "1/b/m", "1/a/n", "2/a/m")]
    for i, one in enumerate(masks):
        assert 9_500 < int(one.sum()) < 10_500
        assert all(int((one == other).sum()) < 10_500 for other in masks[:i])


def test_same_key_same_result() -> None:
    base, x = tensors(20_000)
    assert torch.equal(change(base, x, 0.3), change(base, x, 0.3))


def test_linear_and_ties_drop_the_same_elements() -> None:
    base, x = tensors(20_000)
    settings = {"input_parameters": [{"weight": 1.0, "density": 0.5}], "keys": ["k"]}
    linear, ties = (merge(name, [x], base, **settings) for name in ("dare_linear", "dare_ties"))
    assert torch.equal(linear != base, ties != base)
    assert torch.allclose(linear, ties, rtol=1e-6, atol=1e-7)


def test_unchanged_models_are_not_rescaled() -> None:
    """‖δ‖₁ = 0 and ‖δ̃‖₁ = 0 stay as they are instead of dividing by each other."""
    base, _ = tensors(1000)
    assert torch.count_nonzero(change(base, base, 0.5)) == 0
    almost = base.double().clone()
    almost[7] += 1e-9  # below the limit of 1e-7, kept or dropped
    assert float(change(base, almost, 0.5).abs().sum()) in {0.0, float((almost - base.double()).abs().sum())}


def test_factors_are_the_ratio_of_the_norms() -> None:
    base, x = tensors()
    declaration = METHODS.get("dare_linear")
    operands = MemoryOperands(
        [x, x, x],
        base,
        parameters=declaration.global_parameters(),
        input_parameters=[declaration.model_parameters(weight=1.0, density=d) for d in (0.25, 1.0, 0.0)],
        keys=["a", "b", "c"],
    )
    factors = DareLinear().statistics(operands)
    assert factors[0] == pytest.approx(4.0, rel=0.02)
    assert factors[1:] == [1.0, 1.0]


def test_rescaling_alone_needs_the_whole_tensor() -> None:
    for name in ("dare_linear", "dare_ties"):
        declaration = METHODS.get(name)
        assert declaration.effective_access({}) is Access.REDUCE
        assert declaration.effective_access({"rescale": True, "lambda": 0.5}) is Access.REDUCE
        for off in (False, 0, 0.0):
            assert declaration.effective_access({"rescale": off}) is Access.ELEMENTWISE

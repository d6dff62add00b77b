from __future__ import annotations

import math

import pytest
import torch

from mergekit_ray.core.registry import METHODS
from mergekit_ray.methods.slerp import Slerp
from support.operands import MemoryOperands, merge


def slerp(base: torch.Tensor, x: torch.Tensor, t: float, **options: object) -> torch.Tensor:
    return merge("slerp", [x], base, parameters={"t": t}, **options)


def test_stays_on_the_circle() -> None:
    """Unit vectors at angle θ: the result is the unit vector at angle tθ."""
    for angle in (0.1, 1.0, math.pi / 2, 3.0):
        for t in (0.0, 0.25, 0.5, 1.0):
            base = torch.tensor([1.0, 0.0], dtype=torch.float64)
            x = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
            merged = slerp(base, x, t, compute_dtype=torch.float64)
            expected = torch.tensor([math.cos(t * angle), math.sin(t * angle)], dtype=torch.float64)
            assert torch.allclose(merged, expected, rtol=0, atol=1e-13)


def test_ends_are_exact() -> None:
    generator = torch.Generator().manual_seed(1)
    base, x = torch.randn(1000, generator=generator), torch.randn(1000, generator=generator)
    assert torch.equal(slerp(base, x, 0.0), base)
    assert torch.equal(slerp(base, x, 1.0), x)
    # and along the chord
    near = base * 1.25
    assert torch.equal(slerp(base, near, 0.0), base)
    assert torch.equal(slerp(base, near, 1.0), near)


def test_a_model_and_itself_is_itself() -> None:
    base = torch.randn(1000, generator=torch.Generator().manual_seed(2))
    for t in (0.1, 0.3, 0.5, 0.77):
        assert torch.equal(slerp(base, base, t), base)


def test_colinear_is_linear() -> None:
    base = torch.tensor([1.0, 2.0, -4.0])
    assert torch.equal(slerp(base, 3 * base, 0.5), 2 * base)


def test_antiparallel_is_linear() -> None:
    base = torch.tensor([1.0, 2.0, -4.0])
    assert torch.equal(slerp(base, -base, 0.25), 0.5 * base)
    assert torch.equal(slerp(base, -base, 0.5), torch.zeros(3))


def test_limit_between_arc_and_chord() -> None:
    """cos θ = 0.9995 divides arc from chord; their factors differ by less than 1e-4 there, but they differ."""
    for cosine, is_colinear in ((0.99949, False), (0.99951, True), (-0.99949, False), (-0.99951, True)):
        base = torch.tensor([1.0, 0.0], dtype=torch.float64)
        x = torch.tensor([cosine, math.sqrt(1 - cosine * cosine)], dtype=torch.float64)
        arc = Slerp().statistics(MemoryOperands([x], base, compute_dtype=torch.float64))
        assert arc.is_colinear is is_colinear
        assert arc.cosine == pytest.approx(cosine, abs=1e-15)


@pytest.mark.parametrize("length", [0.0, 5e-9])
def test_a_vector_without_direction_is_not_divided_by(length: float) -> None:
    """u0 = b as it is, so cos θ = b·u1 ≈ 0 and θ = π/2."""
    base, x = torch.tensor([length, 0.0]), torch.tensor([0.6, 0.8])
    t, theta = 0.3, math.acos(length * 0.6)
    merged = slerp(base, x, t)
    expected = (math.sin((1 - t) * theta) * base.double() + math.sin(t * theta) * x.double()) / math.sin(theta)
    assert torch.allclose(merged.double(), expected, rtol=1e-7, atol=0)
    assert torch.equal(slerp(torch.zeros(2), torch.zeros(2), t), torch.zeros(2))


def test_tiny_and_huge_norms_keep_their_angle() -> None:
    """Squares of 1e-30 and 1e30 leave float32, not the float64 they are summed in."""
    for magnitude in (1e-6, 1e30):
        base = torch.tensor([magnitude, 0.0])
        x = torch.tensor([0.0, magnitude])
        half = math.sin(math.pi / 4) * magnitude
        assert torch.allclose(slerp(base, x, 0.5), torch.tensor([half, half]), rtol=1e-6, atol=0)


def test_angle_does_not_depend_on_threads() -> None:
    generator = torch.Generator().manual_seed(3)
    base, x = torch.randn(150_000, generator=generator), torch.randn(150_000, generator=generator)
    threads = torch.get_num_threads()
    try:
        cosines = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            cosines.append(Slerp().statistics(MemoryOperands([x], base)).cosine)
    finally:
        torch.set_num_threads(threads)
    assert len(set(cosines)) == 1
    exact = torch.nn.functional.cosine_similarity(base.double(), x.double(), dim=0)
    assert cosines[0] == pytest.approx(float(exact), rel=1e-7)  # products are float32, their sums float64


def test_is_declared_between_the_base_and_one_model() -> None:
    declaration = METHODS.get("slerp")
    assert declaration.base_is_input
    assert (declaration.min_models, declaration.max_models) == (1, 1)

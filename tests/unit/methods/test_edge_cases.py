"""What every method must survive: every one that is registered, over tensors that recipes really meet."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from mergekit_ray.core.declaration import BaseUse
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Merge
from mergekit_ray.core.registry import METHODS
from mergekit_ray.core.tensors import TensorSpec
from support.memory_inputs import DTYPES, Inputs, evaluate

METHOD_NAMES = METHODS.names()
SHAPES = [(), (1,), (7,), (1, 1), (5, 1), (1, 9), (12, 20), (3, 4, 5)]
REQUIRED = {"weight": 0.4, "t": 0.3}


def randoms(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def required(parameters: type[Any]) -> dict[str, float]:
    """Values for parameters without a default."""
    names = [info.alias or name for name, info in parameters.model_fields.items() if info.is_required()]
    return {name: REQUIRED[name] for name in names}


def num_models(method: str) -> int:
    declaration = METHODS.get(method)
    return declaration.max_models or max(3, declaration.min_models)


def merge(method: str, models: list[torch.Tensor], base: torch.Tensor, **more: Any) -> torch.Tensor:
    """The method with as little said as it allows; weights sum to one where every model has the same."""
    declaration, inputs = METHODS.get(method), Inputs()
    known = declaration.parameter_names()
    per_model = required(declaration.model_parameters)
    if "weight" in per_model:
        per_model["weight"] = 1.0 / len(models)
    given = {name: value for name, value in more.items() if name in known}
    expression = Merge(
        method=method,
        spec=TensorSpec("w", DTYPES[base.dtype], tuple(base.shape)),
        inputs=tuple(inputs.load(f"m{i}", x) for i, x in enumerate(models)),
        base=None if declaration.base is BaseUse.FORBIDDEN else inputs.load("base", base),
        parameters=required(declaration.global_parameters) | {k: v for k, v in given.items() if known[k] == "global"},
        input_parameters=tuple(per_model | {k: v for k, v in given.items() if known[k] == "model"} for _ in models),
        keys=tuple(f"k{i}" for i in range(len(models))),
        compute_dtype=DType.F32,
    )
    return evaluate(expression, inputs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_equal_models_stay_what_they_are(method: str, shape: tuple[int, ...]) -> None:
    x = randoms(shape, 1)
    merged = merge(method, [x.clone() for _ in range(num_models(method))], x)
    assert torch.allclose(merged, x, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_zeros_stay_zeros(method: str, shape: tuple[int, ...]) -> None:
    zeros = torch.zeros(shape)
    assert torch.count_nonzero(merge(method, [zeros.clone() for _ in range(num_models(method))], zeros)) == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_base_of_zeros(method: str, shape: tuple[int, ...]) -> None:
    models = [randoms(shape, seed) for seed in range(num_models(method))]
    assert torch.isfinite(merge(method, models, torch.zeros(shape))).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_opposite_models(method: str, shape: tuple[int, ...]) -> None:
    """Every other model is the negative of the first."""
    x = randoms(shape, 3)
    models = [x * sign for sign, _ in zip(itertools.cycle((1.0, -1.0)), range(num_models(method)), strict=False)]
    for base in (torch.zeros(shape), -x, randoms(shape, 4)):
        assert torch.isfinite(merge(method, models, base)).all()


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_norms_beyond_half_precision(method: str) -> None:
    """Squares and sums of large float16 numbers overflow float16, and must not be taken in it."""
    base = randoms((40, 50), 0).sign().mul(60_000).to(torch.float16)
    models = [(base * (1 - 0.01 * i)).to(torch.float16) for i in range(num_models(method))]
    assert torch.isfinite(merge(method, models, base, rescale=False).float()).all()


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_norms_beyond_single_precision(method: str) -> None:
    base = randoms((40, 50), 0) * 1e30
    models = [base + randoms((40, 50), i + 1) * 1e29 for i in range(num_models(method))]
    merged = merge(method, models, base)
    assert torch.isfinite(merged).all()
    assert float(merged.abs().max()) > 1e29


@pytest.mark.parametrize("scale", [1e-40, 1e-25])
@pytest.mark.parametrize(
    "method", [name for name in METHOD_NAMES if name != "wudi"]
)  # its steps have a size of their own
def test_denormals_and_squares_that_vanish(method: str, scale: float) -> None:
    base = randoms((40, 50), 0) * scale
    models = [randoms((40, 50), i + 1) * scale for i in range(num_models(method))]
    merged = merge(method, models, base)
    assert torch.isfinite(merged).all()
    assert float(merged.abs().max()) < 100 * scale


DENSE = [name for name in METHOD_NAMES if "density" in METHODS.get(name).parameter_names()]
COMPARING = ("pcb", "consensus_ties")
"""Methods that also drop what the other models do not have, whatever the density."""


@pytest.mark.parametrize("method", DENSE)
def test_a_density_of_zero_leaves_the_base(method: str) -> None:
    base = randoms((12, 20), 0)
    models = [randoms((12, 20), seed) for seed in range(1, 4)]
    merged = merge(method, models, base, density=0.0, epsilon=0.0)
    assert torch.equal(merged, base)


@pytest.mark.parametrize("method", [name for name in DENSE if name not in COMPARING])
def test_a_density_of_one_drops_nothing(method: str) -> None:
    """With one model of weight 1, and nothing dropped, the result is the model."""
    base, x = randoms((12, 20), 0), randoms((12, 20), 1)
    merged = merge(method, [x], base, density=1.0, gamma=0.0)
    assert torch.allclose(merged, x, rtol=1e-6, atol=1e-6)

"""Loops take tensors of any floating dtypes; their results are those of the evaluator, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from unit.evaluation.test_compiled import bits, filled

from mergekit_ray.core.declaration import Access, BaseUse
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Merge
from mergekit_ray.core.registry import METHODS
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.evaluation.scratch import TORCH_DTYPES
from mergekit_ray.methods.shared.protocol import SumMethod
from support.memory_inputs import Inputs, evaluate

SIZE = 16 * 40 + 5

PARAMETERS: Mapping[str, Sequence[dict[str, Any]]] = {
    "linear": [{"normalize": True}, {"normalize": False}],
    "task_arithmetic": [{"normalize": True}, {"lambda": 0.7}],
    "nearswap": [{"t": 0.3}, {"t": 1e-6}],
    "slerp": [{"t": 0.3}],
    "nuslerp": [{}],
    "multislerp": [{}],
    "karcher": [{}],
    "model_stock": [{}],
}
WEIGHTS = (0.3, -0.1)


def methods() -> list[str]:
    """All whose loops take any dtypes."""
    found = [METHODS.get(name) for name in METHODS.names()]
    return [method.name for method in found if issubclass(method, SumMethod) and not method.masks]


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("out", [DType.F16, DType.BF16, DType.F32, DType.F64])
def test_bits_of_every_mix(method: str, out: DType) -> None:
    declared = METHODS.get(method)
    num_models = len(WEIGHTS) if declared.max_models is None else declared.max_models
    has_base = declared.base is BaseUse.REQUIRED
    has_weight = "weight" in declared.model_parameters.model_fields
    generator = torch.Generator().manual_seed(1)
    values = [torch.randn(SIZE, generator=generator) for _ in range(num_models + has_base)]
    kinds = [TORCH_DTYPES[dtype] for dtype in (DType.F16, DType.BF16, DType.F32, DType.F64)]
    for parameters, mix in itertools.product(PARAMETERS[method], itertools.product(kinds, repeat=len(values))):
        inputs = Inputs()
        loads = [inputs.load(f"m{i}", x.to(kind)) for i, (x, kind) in enumerate(zip(values, mix, strict=True))]
        expression = Merge(
            method,
            TensorSpec("w", out, (SIZE,)),
            tuple(loads[:num_models]),
            base=loads[-1] if has_base else None,
            parameters=parameters,
            input_parameters=tuple({"weight": w} if has_weight else {} for w in WEIGHTS[:num_models]),
            keys=tuple(load.model for load in loads[:num_models]),
        )
        expected = bits(evaluate(expression, inputs))
        found, is_finite = filled(expression, inputs)
        assert is_finite, mix
        assert torch.equal(bits(found), expected), mix
        if expression.access is not Access.ELEMENTWISE:
            continue  # windows are whole tensors there
        window, _ = filled(expression, inputs, start=7, stop=SIZE - 3)
        assert torch.equal(bits(window), expected[7 * out.itemsize : -3 * out.itemsize]), mix

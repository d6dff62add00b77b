"""What is copied is looked at."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.expressions import Load
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.evaluation.copies import check_copy_finite
from mergekit_ray.evaluation.scratch import TORCH_DTYPES

FLOATS = [DType.F16, DType.BF16, DType.F32, DType.F64]


def load_of(dtype: DType, num_elements: int) -> Load:
    spec = TensorSpec("w", dtype, (num_elements,))
    return Load("m1", spec, Location("f", 0, spec.num_bytes))


def bytes_of(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.uint8).numpy()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 65_535, 65_536, 99_999])
def test_what_is_not_finite_is_named(dtype: DType, value: float, place: int) -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).to(TORCH_DTYPES[dtype])
    load = load_of(dtype, 300_000)
    check_copy_finite(load, bytes_of(x), 100_000)
    x[place] = value
    x[min(place + 5, 99_999)] = value
    with pytest.raises(MergeError) as caught:
        check_copy_finite(load, bytes_of(x), 100_000, {"m1": "org/m"})
    assert caught.value.what.startswith(f"{value} in the input, first at flat index {100_000 + place}")
    assert caught.value.where == "model org/m, tensor 'w'"


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16])
def test_every_number_of_16_bits(dtype: DType) -> None:
    codes = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    for code, is_finite in zip(codes, torch.isfinite(codes.view(TORCH_DTYPES[dtype])), strict=True):
        load, data = load_of(dtype, 1), bytes_of(code.view(1))
        if is_finite:
            check_copy_finite(load, data, 0)
            continue
        with pytest.raises(MergeError, match="in the input") as caught:
            check_copy_finite(load, data, 0)
        value = float(code.view(TORCH_DTYPES[dtype]))
        assert caught.value.what.startswith(f"{value} in" if math.isinf(value) else "nan in")


def test_integers_and_nothing() -> None:
    check_copy_finite(load_of(DType.I64, 3), bytes_of(torch.tensor([1, 2, -1])), 0)
    check_copy_finite(load_of(DType.F32, 0), np.empty(0, np.uint8), 0)

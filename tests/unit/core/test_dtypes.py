"""Element types without torch, checked against torch."""

from __future__ import annotations

import itertools

import pytest
import torch

from mergekit_ray.core.dtypes import DType, promote

FLOATS = [DType.F16, DType.BF16, DType.F32, DType.F64]


@pytest.mark.parametrize(
    ("spelt", "meant"),
    [
        ("bfloat16", DType.BF16),
        ("bf16", DType.BF16),
        ("BF16", DType.BF16),
        (" torch.bfloat16 ", DType.BF16),
        ("float16", DType.F16),
        ("half", DType.F16),
        ("fp16", DType.F16),
        ("torch.float", DType.F32),
        ("F32", DType.F32),
        ("double", DType.F64),
        ("fp64", DType.F64),
    ],
)
def test_parse(spelt: str, meant: DType) -> None:
    assert DType.parse(spelt) is meant


@pytest.mark.parametrize("spelt", ["int8", "I64", "bool", "float8_e4m3fn", "F8_E5M2", "", "bfloat61", "auto"])
def test_parse_refuses_what_cannot_be_averaged(spelt: str) -> None:
    with pytest.raises(ValueError, match="accepted: float16, bfloat16, float32, float64"):
        DType.parse(spelt)


def test_parse_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'bfloat16'"):
        DType.parse("bfloat61")


@pytest.mark.parametrize("dtype", list(DType))
def test_sizes_and_names_are_those_of_torch(dtype: DType) -> None:
    theirs = getattr(torch, dtype.config_name)
    assert theirs.itemsize == dtype.itemsize
    assert dtype.is_floating == (theirs.is_floating_point and theirs.itemsize > 1)


@pytest.mark.parametrize("pair", list(itertools.product(FLOATS, FLOATS)))
def test_promotion_of_two_is_that_of_torch(pair: tuple[DType, DType]) -> None:
    theirs = torch.promote_types(*(getattr(torch, dtype.config_name) for dtype in pair))
    assert promote(pair).config_name == str(theirs).removeprefix("torch.")


@pytest.mark.parametrize("dtypes", [[], [DType.I64], [DType.F32, DType.BOOL], [DType.F8_E4M3]])
def test_promotion_of_what_is_not_floating_is_refused(dtypes: list[DType]) -> None:
    with pytest.raises(ValueError, match="cannot promote"):
        promote(dtypes)


def test_a_dtype_is_shown_as_python_writes_it() -> None:
    assert [eval(repr(dtype), {"DType": DType}) for dtype in DType] == list(DType)  # our own names

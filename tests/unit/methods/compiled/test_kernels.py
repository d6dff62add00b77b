"""The compiled loops and torch's operations give the same results."""

from __future__ import annotations

import math

import pytest
import torch

from mergekit_ray.methods.compiled import is_compiled_for
from mergekit_ray.methods.shared import sign
from mergekit_ray.methods.shared.random_mask import HASH_BLOCK, MaskSpace, RandomMask, hash_words, words_by_torch
from support.operands import MemoryScratch

DTYPES = [torch.float32, torch.float64]


def normal(size: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_where_they_are_used() -> None:
    assert all(is_compiled_for(torch.empty(3, dtype=dtype)) for dtype in DTYPES)
    others = (torch.bfloat16, torch.float16, torch.int32, torch.int64)
    assert not any(is_compiled_for(torch.empty(3, dtype=dtype)) for dtype in others)
    assert not is_compiled_for(torch.empty(3, device="meta"))


@pytest.mark.parametrize("start", [0, 17, HASH_BLOCK - 3, 2**40 + 5])
@pytest.mark.parametrize("length", [0, 1, 15, 1000, 2 * HASH_BLOCK + 7])
def test_words_are_the_same(start: int, length: int) -> None:
    compiled, by_torch, scratch = (torch.empty(length, dtype=torch.int32) for _ in range(3))
    hash_words("key", start, compiled, scratch)
    assert torch.equal(compiled, words_by_torch("key", start, by_torch, scratch))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 15, 17, HASH_BLOCK + 33])
def test_norms_are_those_of_the_mask(dtype: torch.dtype, length: int) -> None:
    values, mask = normal(length, 1, dtype), RandomMask("k", 0.4)
    space = MaskSpace.like(values, MemoryScratch())
    whole, kept = mask.l1_sums(values.clone(), 70_000, space)
    trimmed = mask.apply_(values.clone(), 70_000, space)
    assert math.fsum(whole.tolist()) == pytest.approx(float(values.double().abs().sum()), rel=1e-14)
    assert math.fsum(kept.tolist()) == pytest.approx(float(trimmed.double().abs().sum()), rel=1e-14)


def test_norms_of_masks_that_keep_all_or_nothing() -> None:
    values = normal(1000, 1)
    space = MaskSpace.like(values, MemoryScratch())
    for density, kept_part in ((0.0, 0.0), (1.0, 1.0)):
        whole, kept = RandomMask("k", density).l1_sums(values.clone(), 0, space)
        assert math.fsum(kept.tolist()) == kept_part * math.fsum(whole.tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.3, 0.2], [2.0, -1.0, 0.7, 0.0], [0.1, 0.2, -0.3]])
@pytest.mark.parametrize("length", [1, 7, 5000])
def test_elections_have_the_same_outcome(
    dtype: torch.dtype, normalize: bool, weights: list[float], length: int
) -> None:
    base = normal(length, 0, dtype)
    terms = [normal(length, seed, dtype) for seed in range(1, len(weights) + 1)]
    terms[0][::3] = 0.0
    factors = [weight * 1.7 for weight in weights]
    compiled = sign.add_elected_(
        base.clone(), terms, weights, factors=factors, normalize=normalize, scale=0.8, scratch=MemoryScratch()
    )
    by_torch = sign.add_elected_by_torch_(
        base.clone(),
        [x.clone() for x in terms],
        weights,
        factors,
        normalize=normalize,
        scale=0.8,
        scratch=MemoryScratch(),
    )
    assert torch.allclose(compiled, by_torch, rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)

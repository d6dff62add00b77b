"""Magnitude sampling: compiled, by torch, and by sorting rows one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_ray.core.errors import MergeError
from mergekit_ray.methods.compiled import ranks as compiled
from mergekit_ray.methods.shared.packed_mask import PackedMask
from mergekit_ray.methods.shared.protocol import BLOCK_ELEMENTS
from mergekit_ray.methods.shared.random_mask import MaskSpace, RandomMask
from mergekit_ray.methods.shared.rank_sampling import MagnitudeSampling, Sampled, row_length, run_elements
from support.operands import MemoryScratch
from support.references import trimming
from support.references.merge import Array

MANTISSA_BITS = {torch.float32: 23, torch.float64: 52}


def random(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def rounded_differences(size: int) -> torch.Tensor:
    """Of bfloat16 weights: a third of them zero, and few different ones."""
    base = (0.02 * random(size, 1)).bfloat16()
    return ((base.float() + 1e-4 * random(size, 2)).bfloat16() - base).float()


ROWS = {
    "continuous": random,
    "of 16-bit weights": rounded_differences,
    "three levels": lambda size: (random(size) * 0.7).round() * 1e-3,
    "one level": lambda size: torch.full((size,), -0.25),
    "zeros": torch.zeros,
    "one is not zero": lambda size: (torch.arange(size) == size // 2).float(),
    "far apart": lambda size: random(size) * 10.0 ** (random(size, 3) * 8),
    "an outlier": lambda size: torch.where(torch.arange(size) == 3, torch.tensor(1e30), random(size)),
    "denormal": lambda size: random(size) * 1e-42,
    "infinite": lambda size: torch.where(torch.arange(size) % 5 == 0, torch.tensor(-torch.inf), random(size)),
    "crowded": lambda size: 1.0 + 1e-6 * random(size).round(decimals=1),
}


def sampled(x: torch.Tensor, words: torch.Tensor, length: int, low: float, high: float) -> Array:
    kept = torch.empty(x.numel(), dtype=torch.uint8)
    patterns = x.abs().view({4: torch.int32, 8: torch.int64}[x.itemsize])
    step = (high - low) / max(length - 1, 1)
    bits = MANTISSA_BITS[x.dtype]
    compiled.keep_rows(patterns.numpy(), words.numpy(), kept.numpy(), length, low, step, bits)
    return kept.numpy().astype(bool)


def expected(x: torch.Tensor, words: torch.Tensor, length: int, low: float, high: float) -> Array:
    step = (high - low) / max(length - 1, 1)
    ranks = np.concatenate([trimming.ranks(row) for row in x.abs().double().numpy().reshape(-1, length)])
    return words.numpy() < np.floor((low + step * ranks) * 2.0**32) - 2.0**31


def random_words(size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randint(-(2**31), 2**31, (size,), generator=generator).to(torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 17, 256, 4000])
@pytest.mark.parametrize("kind", ROWS)
def test_compiled_loops_keep_what_sorted_rows_would(kind: str, length: int, dtype: torch.dtype) -> None:
    size = max(1, 4000 // length) * length
    x = ROWS[kind](size).to(dtype)
    words = random_words(size)
    for low, high in ((0.35, 0.65), (0.001, 0.999), (0.5, 0.5), (0.01, 0.02)):
        assert np.array_equal(sampled(x, words, length, low, high), expected(x, words, length, low, high))


@pytest.mark.parametrize("kind", ["continuous", "of 16-bit weights", "far apart", "crowded"])
def test_rows_longer_than_a_block(kind: str) -> None:
    length = BLOCK_ELEMENTS + 12_345
    x, words = ROWS[kind](length), random_words(length)
    assert np.array_equal(sampled(x, words, length, 0.2, 0.6), expected(x, words, length, 0.2, 0.6))


@settings(max_examples=150, deadline=None)
@given(
    levels=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=40),
    repeats=st.integers(1, 4),
    num_rows=st.integers(1, 3),
    density=st.floats(0.3, 0.7),
    epsilon=st.floats(0.0, 0.29),
)
def test_any_rows(levels: list[float], repeats: int, num_rows: int, density: float, epsilon: float) -> None:
    length = len(levels) * repeats
    x, words = torch.tensor(levels * repeats * num_rows), random_words(length * num_rows)
    low, high = density - epsilon, density + epsilon
    assert np.array_equal(sampled(x, words, length, low, high), expected(x, words, length, low, high))


def sample(sampling: MagnitudeSampling, x: torch.Tensor, length: int, start: int = 0) -> tuple[Array, Sampled]:
    found = sampling.sample(x.clone(), start, length, MemoryScratch())
    return PackedMask(found.mask).unpack(0, x.numel()).numpy().astype(bool), found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("length", [1, 7, 300])
def test_masks_are_those_of_the_definition(length: int, dtype: torch.dtype) -> None:
    x = random(2100).to(dtype)
    kept, found = sample(MagnitudeSampling("key", 0.4, 0.3), x, length)
    magnitudes = x.abs().double().numpy()
    assert np.array_equal(kept, trimming.keep_sampled("key", magnitudes.reshape(-1, length), 0.4, 0.3).reshape(-1))
    assert float(found.whole.sum()) == pytest.approx(magnitudes.sum(), rel=1e-12)
    assert float(found.kept.sum()) == pytest.approx(magnitudes[kept].sum(), rel=1e-12)


@pytest.mark.parametrize("kind", ROWS)
def test_sorting_by_torch_keeps_the_same(kind: str) -> None:
    x, words = ROWS[kind](4000), random_words(4000)
    for length in (1, 8, 500, 4000):
        sampling = MagnitudeSampling("key", 0.4, 0.3)
        low, step = sampling.probabilities(length)
        by_torch = sampling.keep_by_torch(x.abs(), words, length).numpy().astype(bool)
        assert np.array_equal(by_torch, sampled(x, words, length, low, low + step * (length - 1)))


def test_norms_by_torch_are_the_compiled_ones() -> None:
    x, words = random(70_001), random_words(70_001)
    sampling = MagnitudeSampling("key", 0.4, 0.3)
    found = sampling.sampled_by_torch(x.clone(), words, 70_001, MemoryScratch())
    kept = PackedMask(found.mask).unpack(0, 70_001)
    whole, part = compiled.kept_norms(x.abs().numpy(), kept.numpy())
    assert float(found.whole.sum()) == pytest.approx(whole, rel=1e-13)
    assert float(found.kept.sum()) == pytest.approx(part, rel=1e-13)
    exact = x.abs().double()
    assert whole == pytest.approx(float(exact.sum()), rel=1e-13)
    assert part == pytest.approx(float(exact[kept.bool()].sum()), rel=1e-13)


def test_without_epsilon_it_is_the_random_mask() -> None:
    x = random(70_000)
    kept, _ = sample(MagnitudeSampling("key", 0.3, 0.0), x, 700, start=140_000)
    scratch = MemoryScratch()
    dropped = RandomMask("key", 0.3).apply_(x.clone(), 140_000, MaskSpace.like(x, scratch))
    assert np.array_equal(kept, (dropped != 0).numpy())


def test_large_magnitudes_are_kept_more_often() -> None:
    """The share of each tenth of the ranks is its mean probability, within five standard deviations of a binomial."""
    x = random(400_000)
    kept, _ = sample(MagnitudeSampling("key", 0.5, 0.4), x, 1000)
    order = np.argsort(x.abs().numpy().reshape(400, 1000), axis=1)
    tenths = np.take_along_axis(kept.reshape(400, 1000), order, axis=1).reshape(400, 10, 100).mean(axis=(0, 2))
    probabilities = 0.1 + 0.8 * (np.arange(10) * 100 + 49.5) / 999
    assert (np.abs(tenths - probabilities) < 5 * np.sqrt(probabilities * (1 - probabilities) / 40_000)).all()


@pytest.mark.parametrize(("density", "epsilon"), [(0.9, 0.15), (0.1, 0.15), (0.85, 0.15), (0.15, 0.15), (0.5, 0.5)])
def test_probabilities_stay_within_0_and_1(density: float, epsilon: float) -> None:
    with pytest.raises(MergeError) as caught:
        MagnitudeSampling("key", density, epsilon)
    assert f"density {density:g} ± epsilon {epsilon:g}" in str(caught.value)
    assert "epsilon" in str(caught.value.remedy)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_all_or_nothing_needs_no_epsilon(density: float) -> None:
    assert not MagnitudeSampling("key", density, 0.15).is_random


@pytest.mark.parametrize("length", [1, 3, 8, 999, 4096, 14_336, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS + 1])
def test_runs_are_whole_rows_and_whole_bytes(length: int) -> None:
    elements = run_elements(length)
    assert elements % length == 0
    assert elements % 8 == 0
    assert elements <= max(BLOCK_ELEMENTS, 8 * length)
    assert elements >= BLOCK_ELEMENTS // 2


def test_rows_lie_along_the_last_dimension() -> None:
    assert [row_length(shape) for shape in [(), (5,), (2, 3), (4, 0)]] == [1, 5, 3, 0]
    assert run_elements(0) > 0

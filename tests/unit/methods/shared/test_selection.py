"""Exactly k, against a stable sort of the whole tensor."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_ray.methods.shared import order_statistics
from mergekit_ray.methods.shared.order_statistics import (
    Threshold,
    by_bracket,
    by_radix,
    collected_bytes,
    cut_after,
    kth_largest,
    patterns_,
)
from mergekit_ray.methods.shared.protocol import BLOCK_ELEMENTS, Chunk
from mergekit_ray.methods.shared.selection import Band, Selection, select_largest, select_next_largest, selection_at
from support.operands import MemoryOperands

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def values(chunk: Chunk, index: int) -> torch.Tensor:
    return chunk.inputs[index]


def expected_mask(x: torch.Tensor, count: int) -> torch.Tensor:
    order = np.argsort(-x.abs().double().numpy(), kind="stable")
    mask = torch.zeros(x.numel(), dtype=torch.bool)
    mask[torch.from_numpy(order[:count].copy())] = True
    return mask


def select(x: torch.Tensor, count: int) -> Selection:
    return select_largest(MemoryOperands([x], compute_dtype=x.dtype), [count], values)[0]


def select_by_radix(x: torch.Tensor, count: int) -> Selection:
    operands = MemoryOperands([x], compute_dtype=x.dtype)
    threshold = by_radix(operands, {0: count}, values)[0]
    return selection_at(threshold, operands, cut_after(operands, 0, threshold, values))


WAYS = [select, select_by_radix]


def check(x: torch.Tensor, count: int, way: Callable[[torch.Tensor, int], Selection] = select) -> None:
    selection = way(x, count)
    expected = expected_mask(x, count)
    assert torch.equal(selection.mask(x, 0), expected)
    assert torch.equal(selection.trim_(x.clone(), 0), torch.where(expected, x, torch.zeros_like(x)))
    # in pieces, one of which has the cut inside
    for size in (x.numel() // 7 + 1, max(selection.cut, 1)):
        pieces = [selection.trim_(x[i : i + size].clone(), i) for i in range(0, x.numel(), size)]
        assert torch.equal(torch.cat(pieces), torch.where(expected, x, torch.zeros_like(x)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_random_values(dtype: torch.dtype, way: Callable[[torch.Tensor, int], Selection]) -> None:
    x = torch.randn(150_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    for count in (1, 2, 777, 75_000, 150_000):
        check(x, count, way)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_enough_to_be_sampled(dtype: torch.dtype) -> None:
    x = (torch.randn(1_500_000, generator=torch.Generator().manual_seed(1)) * 0.01).to(dtype)
    for density in (1e-5, 0.01, 0.2, 0.5, 0.99, 0.99999):
        count = math.floor(density * x.numel())
        assert 0 in by_bracket(MemoryOperands([x], compute_dtype=dtype), {0: count}, values)
        check(x, count)


def quantised(seed: int, zeros: float) -> torch.Tensor:
    """The change a short fine-tune makes to bfloat16 weights: mostly zeros and a few steps of the format."""
    generator = torch.Generator().manual_seed(seed)
    base = (0.02 * torch.randn(500_000, generator=generator)).bfloat16()
    change = 1e-4 * torch.randn(500_000, generator=generator)
    change[torch.rand(500_000, generator=generator) < zeros] = 0
    return (base.float() + change).bfloat16().float() - base.float()


@pytest.mark.parametrize("zeros", [0.0, 0.6, 0.95])
def test_many_ties_and_zeros(zeros: float) -> None:
    x = quantised(2, zeros)
    for density in (0.01, 0.1, 0.3, 0.5, 0.9):
        check(x, math.floor(density * x.numel()))
        assert int(select(x, math.floor(density * x.numel())).mask(x, 0).sum()) == math.floor(density * x.numel())


@pytest.mark.parametrize("way", WAYS)
def test_all_equal_keeps_the_lowest_indices(way: Callable[[torch.Tensor, int], Selection]) -> None:
    x = torch.full((600_000,), -0.5)
    x[1::2] = 0.5
    for count in (1, 262_144, 262_145, 599_999):
        selection = way(x, count)
        assert torch.equal(selection.mask(x, 0), torch.arange(600_000) < count)
        assert torch.count_nonzero(selection.trim_(x.clone(), 0)) == count


@pytest.mark.parametrize("way", WAYS)
def test_all_zero(way: Callable[[torch.Tensor, int], Selection]) -> None:
    x = torch.zeros(700_000)
    selection = way(x, 1234)
    assert torch.equal(selection.mask(x, 0), torch.arange(700_000) < 1234)
    assert torch.equal(selection.trim_(x.clone(), 0), x)


@pytest.mark.parametrize("way", WAYS)
def test_negative_zero_is_a_zero(way: Callable[[torch.Tensor, int], Selection]) -> None:
    x = torch.tensor([0.0, -0.0, 2.0, -0.0, 0.0, -1.0])
    assert way(x, 4).mask(x, 0).tolist() == [True, True, True, False, False, True]
    assert way(x, 1).mask(x, 0).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_denormals_are_ordered(dtype: torch.dtype, way: Callable[[torch.Tensor, int], Selection]) -> None:
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x = (torch.tensor([3, -1, 2, 0, -4, 2, 1], dtype=torch.float64) * smallest).to(dtype)
    assert torch.unique(x.abs()).numel() == 5
    for count in range(1, 7):
        check(x, count, way)


def test_none_and_all() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    assert torch.equal(select(x, 0).trim_(x.clone(), 0), torch.zeros(1000))
    assert not select(x, 0).mask(x, 0).any()
    assert torch.equal(select(x, 1000).trim_(x.clone(), 0), x)
    assert select(x, 1000).mask(x, 0).all()


def test_nothing_is_read_to_keep_none_or_all_of_nothing() -> None:
    operands = MemoryOperands([torch.empty(0), torch.empty(0)])
    assert [s.mask(torch.empty(0), 0).numel() for s in select_largest(operands, [0, 0], values)] == [0, 0]
    operands = MemoryOperands([torch.ones(5), torch.ones(5)])
    select_largest(operands, [0, 5], values)
    assert operands.blocks_read == 0


def test_infinities_rank_highest() -> None:
    x = torch.tensor([1.0, -math.inf, 3.0, math.inf, 1e38])
    assert select(x, 3).mask(x, 0).tolist() == [False, True, False, True, True]


def test_models_share_one_pass() -> None:
    generator = torch.Generator().manual_seed(4)
    xs = [torch.randn(2 * BLOCK_ELEMENTS + 9000, generator=generator) for _ in range(3)]
    operands = MemoryOperands(xs)
    selections = select_largest(operands, [100, 0, 70_000], values)
    for x, count, selection in zip(xs, [100, 0, 70_000], selections, strict=True):
        assert torch.equal(selection.mask(x, 0), expected_mask(x, count))
    # three blocks once, and one look at the device
    assert operands.blocks_read <= 3 + 1


def test_a_misleading_sample_falls_back() -> None:
    """Values that decrease over the tensor within a block whose sampled offsets hold something else."""
    x = torch.linspace(1.0, 2.0, 12 * BLOCK_ELEMENTS)
    stride = (12 * BLOCK_ELEMENTS // order_statistics._SAMPLE) | 1
    for start in range(0, x.numel(), BLOCK_ELEMENTS):
        x[start : start + BLOCK_ELEMENTS : stride] = 100.0
    operands = MemoryOperands([x])
    count = x.numel() // 2
    assert by_bracket(operands, {0: count}, values) == {}
    check(x, count)


def test_too_many_to_collect_fall_back() -> None:
    """The sample sees two values far apart, and all others lie between them."""
    x = torch.linspace(1.0, 2.0, 12 * BLOCK_ELEMENTS)
    stride = (12 * BLOCK_ELEMENTS // order_statistics._SAMPLE) | 1
    for start in range(0, x.numel(), BLOCK_ELEMENTS):
        x[start : start + BLOCK_ELEMENTS : 2 * stride] = 0.5
        x[start + stride : start + BLOCK_ELEMENTS : 2 * stride] = 100.0
    assert by_bracket(MemoryOperands([x]), {0: x.numel() // 2}, values) == {}
    check(x, x.numel() // 2)


def test_equals_are_counted_and_not_collected() -> None:
    """However many there are, which is more than may be collected."""
    for x in (torch.ones(8 * BLOCK_ELEMENTS), torch.arange(8 * BLOCK_ELEMENTS) % 3 + 1.0):
        operands = MemoryOperands([x])
        for count in (BLOCK_ELEMENTS, 3 * BLOCK_ELEMENTS, 5 * BLOCK_ELEMENTS, x.numel() - 1):
            assert 0 in by_bracket(operands, {0: count}, values)
            check(x, count)


def test_what_is_collected_is_a_twentieth_at_each_place_and_two_more() -> None:
    num_elements = 1 << 29
    assert collected_bytes(num_elements, 10, 4) == 12 * 4 * ((1 << 20) + num_elements // 20)
    assert collected_bytes(1000, 2, 8) == 4 * 8 * 1000


def test_both_ways_agree_on_every_threshold() -> None:
    x = quantised(5, 0.3)
    operands = MemoryOperands([x])
    for count in (10, 1000, 100_000, 400_000):
        bracket, radix = by_bracket(operands, {0: count}, values)[0], by_radix(operands, {0: count}, values)[0]
        assert radix == Threshold(bracket.pattern, bracket.num_equal_kept, bracket.is_exhausted, None)


@settings(max_examples=200, deadline=None)
@given(
    levels=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=60),
    repeats=st.integers(1, 3),
    part=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
)
def test_any_values_and_any_count(levels: list[float], repeats: int, part: float, dtype: torch.dtype) -> None:
    x = torch.tensor(levels * repeats).to(dtype)
    count = math.floor(part * x.numel())
    check(x, count)
    if 0 < count < x.numel():
        check(x, count, select_by_radix)


def test_small_blocks_sample_and_select(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampled way on tensors that would be collected whole."""
    monkeypatch.setattr(order_statistics, "SMALL_BLOCKS", 0)
    generator = torch.Generator().manual_seed(6)
    for size in (1, 2, 50, 5000):
        x = torch.randn(size, generator=generator)
        for count in {1, size // 3, size - 1} - {0, size}:
            check(x, count)


def test_patterns_order_as_magnitudes() -> None:
    x = torch.tensor([0.0, -1e-45, 1e-38, -1.0, 1.5, -math.inf])
    patterns = patterns_(x.clone()).tolist()
    assert patterns == sorted(patterns)
    assert patterns[0] == 0


def check_band(x: torch.Tensor, dropped: int, count: int) -> None:
    band = select_next_largest(MemoryOperands([x], compute_dtype=x.dtype), [dropped], [count], values)[0]
    expected = expected_mask(x, dropped + count) & ~expected_mask(x, dropped)
    assert torch.equal(band.mask(x, 0), expected)
    trimmed = torch.where(expected, x, torch.zeros_like(x))
    least = x.numel() // 50 + 1  # not thousands of pieces
    for size in (x.numel(), x.numel() // 7 + 1, max(band.largest.cut, least), max(band.dropped.cut, least)):
        pieces = [band.trim_(x[i : i + size].clone(), i) for i in range(0, x.numel(), size)]
        assert torch.equal(torch.cat(pieces), trimmed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_next_largest(dtype: torch.dtype) -> None:
    x = torch.randn(5001, generator=torch.Generator().manual_seed(7)).to(dtype)
    for dropped, count in ((0, 7), (1, 1), (200, 3000), (2500, 2501), (5001, 0), (0, 5001), (50, 0)):
        check_band(x, dropped, count)


def test_the_next_largest_of_many_ties_and_zeros() -> None:
    x = quantised(8, 0.6)
    for dropped, count in ((5000, 100_000), (150_000, 200_000), (300_000, 150_000)):
        check_band(x, dropped, count)
    equal = torch.full((600_000,), -0.5)
    band = select_next_largest(MemoryOperands([equal]), [100_000], [300_000], values)[0]
    index = torch.arange(600_000)
    assert torch.equal(band.mask(equal, 0), (index >= 100_000) & (index < 400_000))


@settings(max_examples=100, deadline=None)
@given(
    levels=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=60),
    ends=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_values_and_any_band(levels: list[float], ends: tuple[float, float], dtype: torch.dtype) -> None:
    x = torch.tensor(levels).to(dtype)
    dropped, last = sorted(math.floor(end * x.numel()) for end in ends)
    check_band(x, dropped, last - dropped)


def test_a_band_by_torch_is_the_compiled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    x = quantised(9, 0.3)
    band = Band(select(x, 200_000), select(x, 3000))
    compiled = band.trim_(x.clone(), 0)
    monkeypatch.setattr("mergekit_ray.methods.shared.selection.is_compiled_for", lambda _: False)
    assert torch.equal(band.trim_(x.clone(), 0), compiled)


def test_both_ends_of_a_band_share_one_pass() -> None:
    generator = torch.Generator().manual_seed(10)
    xs = [torch.randn(6 * BLOCK_ELEMENTS + 9000, generator=generator) for _ in range(2)]
    operands = MemoryOperands(xs)
    bands = select_next_largest(operands, [9000, 500], [700_000, 0], values)
    for x, dropped, count, band in zip(xs, (9000, 500), (700_000, 0), bands, strict=True):
        expected = expected_mask(x, dropped + count) & ~expected_mask(x, dropped)
        assert torch.equal(band.mask(x, 0), expected)
    # a look at the device, seven sampled blocks and seven of the pass
    assert operands.blocks_read <= 1 + 7 + 7


@pytest.mark.parametrize("way", [kth_largest, by_bracket, by_radix])
def test_several_ranks_of_one_run(way: Callable[..., dict[int, Threshold]]) -> None:
    generator = torch.Generator().manual_seed(11)
    xs = [torch.randn(300_000, generator=generator) for _ in range(2)]
    asked: list[int] = []

    def once(chunk: Chunk, index: int) -> torch.Tensor:
        asked.append(index)
        return chunk.inputs[index].neg_()  # in place: twice would be another run

    ranks = {0: 10, 1: 20, 2: 299_990, 3: 100_000}
    found = way(MemoryOperands(xs), ranks, once, lambda place: place % 2)
    for place, rank in ranks.items():
        descending = xs[place % 2].abs().sort(descending=True).values
        assert found[place].pattern == int(descending[rank - 1].view(torch.int32))
    assert asked.count(0) == asked.count(1)

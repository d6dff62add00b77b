"""Reused memory: a stack for each thread, buffers by size class for a worker."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ray.evaluation.scratch import ThreadScratch
from mergekit_ray.worker.buffers import BufferPool


def test_a_stack_hands_out_distinct_memory_and_reuses_it() -> None:
    scratch = ThreadScratch()
    mark = scratch.mark()
    a, b = scratch.take(10, torch.float32), scratch.take(10, torch.float32)
    assert a.data_ptr() != b.data_ptr()
    scratch.release(mark)
    again = scratch.take(5, torch.float32)
    assert again.data_ptr() == a.data_ptr()
    assert again.shape == (5,)


def test_inner_marks_release_only_what_came_after_them() -> None:
    scratch = ThreadScratch()
    outer = scratch.take(4, torch.float32)
    mark = scratch.mark()
    inner, other = scratch.take(4, torch.float32), scratch.take(4, torch.int32)
    scratch.release(mark)
    assert scratch.take(4, torch.float32).data_ptr() == inner.data_ptr() != outer.data_ptr()
    assert scratch.take(4, torch.int32).data_ptr() == other.data_ptr()


def test_a_larger_request_replaces_the_buffer() -> None:
    scratch = ThreadScratch()
    mark = scratch.mark()
    scratch.take(4, torch.float32)
    scratch.release(mark)
    assert scratch.take(400, torch.float32).shape == (400,)
    assert scratch.held_elements == {torch.float32: 400}


def test_like() -> None:
    scratch = ThreadScratch()
    x = torch.zeros(2, 3, dtype=torch.float64)
    assert (scratch.like(x).shape, scratch.like(x).dtype) == ((2, 3), torch.float64)
    assert scratch.like(x, torch.int32).dtype == torch.int32


@given(st.integers(1, 1 << 40))
def test_size_classes_are_at_most_an_eighth_or_a_page_larger(num_bytes: int) -> None:
    size = BufferPool.size_class(num_bytes)
    assert num_bytes <= size <= max(num_bytes + 4096, num_bytes * 9 // 8 + 1)
    assert BufferPool.size_class(size) == size


def test_a_buffer_given_back_is_handed_out_again() -> None:
    pool = BufferPool(1 << 20)
    a = pool.take(10_000)
    pool.give(a)
    assert pool.take(9_900).ctypes.data == a.ctypes.data
    assert pool.take(9_900).ctypes.data != a.ctypes.data


@pytest.mark.parametrize("seed", range(5))
def test_what_is_held_never_exceeds_the_limit_while_users_keep_theirs(seed: int) -> None:
    limit = 1 << 20
    pool, drawn, in_use = BufferPool(limit), random.Random(seed), []
    for _ in range(400):
        size = drawn.choice([5_000, 50_000, 100_000, 300_000])
        while in_use and sum(b.size for b in in_use) + pool.size_class(size) > limit:
            pool.give(in_use.pop(drawn.randrange(len(in_use))))
        in_use.append(pool.take(size))
        held = sum(b.size for b in (*in_use, *pool.idle))
        assert held == pool.total_bytes <= limit
        addresses = [b.ctypes.data for b in (*in_use, *pool.idle)]
        assert len(set(addresses)) == len(addresses)

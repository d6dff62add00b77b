from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ray.storage.ranges import Fetch, plan_fetches

FILE = bytes(i * 37 % 256 for i in range(2_000))


def spans(size: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda pair: (min(pair), max(pair)))


def deliver(fetch: Fetch, stop_after: int) -> None:
    """Hand at most ``stop_after`` bytes of the request's answer to its pieces, as a connection that breaks would."""
    available = min(stop_after, fetch.end - fetch.position)
    for num_skipped, buffer in fetch.remaining():
        for view in (None, buffer):
            count = min(num_skipped if view is None else len(view), available)
            if view is not None:
                view[:count] = FILE[fetch.position : fetch.position + count]
            fetch.position += count
            available -= count
        if not available:
            return


@given(
    ranges=st.lists(spans(len(FILE)), max_size=12),
    gap=st.integers(0, 300),
    part=st.integers(1, 500),
    step=st.integers(1, 400),
)
def test_fetches_fill_every_buffer_however_often_they_break_off(
    ranges: list[tuple[int, int]], gap: int, part: int, step: int
) -> None:
    buffers = [bytearray(end - start) for start, end in ranges]
    fetches = plan_fetches(ranges, [memoryview(buffer) for buffer in buffers], max_gap_bytes=gap, part_bytes=part)
    for fetch in fetches:
        assert 0 < fetch.end - fetch.start <= part
        while fetch.position < fetch.end:
            deliver(fetch, step)
        assert list(fetch.remaining()) == []
    assert [bytes(buffer) for buffer in buffers] == [FILE[start:end] for start, end in ranges]


def plan(ranges: list[tuple[int, int]], gap: int, part: int) -> list[tuple[int, int]]:
    buffers = [memoryview(bytearray(end - start)) for start, end in ranges]
    return [(f.start, f.end) for f in plan_fetches(ranges, buffers, max_gap_bytes=gap, part_bytes=part)]


def test_close_ranges_share_a_request_and_far_ones_do_not() -> None:
    assert plan([(30, 40), (0, 10), (12, 20)], gap=2, part=1000) == [(0, 20), (30, 40)]
    assert plan([(0, 10), (10, 20)], gap=0, part=1000) == [(0, 20)]
    assert plan([(0, 10), (5, 20)], gap=5, part=1000) == [(0, 10), (5, 20)]
    assert plan([(3, 3)], gap=5, part=1000) == []


def test_big_ranges_are_cut_into_equal_parts() -> None:
    assert plan([(0, 100)], gap=0, part=40) == [(0, 34), (34, 68), (68, 100)]
    assert plan([(0, 50), (51, 100)], gap=1, part=50) == [(0, 50), (51, 100)]


@pytest.mark.parametrize(("span", "size"), [((5, 4), 1), ((-1, 4), 5), ((0, 4), 5)])
def test_nonsense_is_refused(span: tuple[int, int], size: int) -> None:
    with pytest.raises(ValueError, match=r"range"):
        plan_fetches([span], [memoryview(bytearray(size))], max_gap_bytes=0, part_bytes=10)

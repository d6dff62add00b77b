"""Parts of a window come in order, a few at a time, and nobody waits for what will not come."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import MergeError
from mergekit_ray.core.expressions import Load, Merge
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.windows import MAX_PART_BYTES
from mergekit_ray.worker.buffers import BufferPool
from mergekit_ray.worker.parts import PART_BYTES, Parts, cut
from support.shards import big_model, files_below, load_of, long_tensors, make_worker, shard_of


@given(
    start=st.integers(0, 1 << 40),
    length=st.integers(1, 1 << 28),
    itemsize=st.sampled_from([1, 2, 4, 8]),
    num_threads=st.integers(1, 64),
)
def test_parts_cover_a_window_and_are_of_about_one_size(
    start: int, length: int, itemsize: int, num_threads: int
) -> None:
    found = list(cut(start, start + length, itemsize, num_threads))
    assert [first for first, _ in found] == [start, *(last for _, last in found[:-1])]
    assert found[-1][1] == start + length
    sizes = [last - first for first, last in found]
    assert len(set(sizes[:-1])) <= 1
    assert min(sizes) > 0
    # As large as a thread's share times the threads, and what is rounded up.
    assert max(sizes) * itemsize <= min(num_threads * PART_BYTES, MAX_PART_BYTES) + itemsize * (1 << 16)


def test_a_part_is_written_once_it_is_finished() -> None:
    buffers, written = BufferPool(1 << 30), []
    parts = Parts(buffers, threading.Event())
    out = parts.take(10)

    def finish() -> None:
        out[:10] = 7

    parts.put(out, 10, finish)
    parts.end()
    parts.write(lambda data: written.append(bytes(data)))
    assert written == [bytes([7]) * 10]


def test_idle_buffers_make_room_for_what_is_set_aside() -> None:
    buffers = BufferPool(5 * 4096)
    held = [buffers.take(4096) for _ in range(4)]
    for buffer in held:
        buffers.give(buffer)
    buffers.set_aside(3 * 4096)
    assert (len(buffers.idle), buffers.total_bytes) == (2, 5 * 4096)
    buffers.set_aside(-3 * 4096)
    assert (len(buffers.idle), buffers.total_bytes) == (2, 2 * 4096)


def test_they_are_written_in_order_and_their_buffers_used_again() -> None:
    buffers, written, given_out = BufferPool(1 << 30), [], set()
    parts = Parts(buffers, threading.Event())

    def make() -> None:
        for i in range(50):
            out = parts.take(5000)
            given_out.add(out.__array_interface__["data"][0])
            out[:5000] = i
            parts.put(out, 5000)
        parts.end()

    maker = threading.Thread(target=make)
    maker.start()
    parts.write(lambda data: written.append(bytes(data)))
    maker.join()
    assert written == [bytes([i]) * 5000 for i in range(50)]
    assert len(given_out) <= 3


def test_nobody_waits_for_room_once_all_has_failed() -> None:
    failed = threading.Event()
    parts = Parts(BufferPool(1 << 30), failed)
    parts.put(parts.take(10), 10)
    parts.put(parts.take(10), 10)
    timer = threading.Timer(0.05, failed.set)
    timer.start()
    with pytest.raises(CancelledError):
        parts.take(10)
    timer.join()


def karcher(name: str, *inputs: Load) -> Merge:
    """What must be seen as a whole, and is one window."""
    spec = TensorSpec(name, DType.BF16, inputs[0].spec.shape)
    return Merge("karcher", spec, inputs, None, {}, ({},) * len(inputs), ("",) * len(inputs))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_window_of_many_parts_is_the_same_as_one_of_one(tmp_path: Path, num_threads: int) -> None:
    models = [big_model(tmp_path / name, *long_tensors(i)) for i, name in enumerate("ab")]
    inputs = {model.key: model for model in models}
    shard = shard_of(("big", karcher("big", *(load_of(model, "t0") for model in models))))
    whole = make_worker(inputs, tmp_path / "whole").run(shard)
    assert whole.tensors
    in_parts = make_worker(inputs, tmp_path / "cut", num_threads=num_threads, part_bytes=1).run(shard)
    assert (in_parts.sha256, in_parts.tensors) == (whole.sha256, whole.tensors)


@pytest.mark.parametrize("place", [0, 299_999])
def test_what_is_not_finite_in_any_part_is_told_of(tmp_path: Path, place: int) -> None:
    tensors = [long_tensors(i)[0] for i in range(2)]
    tensors[1][place] = torch.nan
    models = [big_model(tmp_path / name, tensor) for name, tensor in zip("ab", tensors, strict=True)]
    shard = shard_of(("big", karcher("big", *(load_of(model, "t0") for model in models))))
    with pytest.raises(MergeError, match=f"flat index {place} "):
        make_worker({model.key: model for model in models}, tmp_path / "out", part_bytes=1).run(shard)
    assert files_below(tmp_path / "out") == set()

"""Inputs that several tensors of a shard are made of are fetched once, where there is memory for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Expression, Load, Noise, Scale
from mergekit_ray.core.plan import InputFile, InputModel, Shard
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning.partition import partition
from mergekit_ray.planning.windows import FIXED_BYTES, batches
from mergekit_ray.storage.local.store import LocalSource, LocalStore
from mergekit_ray.storage.protocols import FileStat
from mergekit_ray.worker.buffers import BufferPool
from mergekit_ray.worker.held_inputs import HeldInputs
from mergekit_ray.worker.resources import Resources, WorkerOptions
from mergekit_ray.worker.worker import Worker
from support.memory_inputs import write_model

NUM_ELEMENTS = 200_000
NUM_BYTES = 2 * NUM_ELEMENTS


def budget(num_bytes: int) -> int:
    """Of a worker whose windows may take so many bytes."""
    return FIXED_BYTES + num_bytes * 9 // 8


AMPLE, TIGHT = budget(64 << 20), budget(NUM_BYTES)


class CountingSource:
    """A store whose files cannot be mapped, and that counts what is read."""

    def __init__(self, folder: Path) -> None:
        self._inner = LocalSource(folder)
        self.uri = self._inner.uri
        self.read_bytes = 0

    def list(self) -> list[FileStat]:
        return self._inner.list()

    def stat(self, name: str) -> FileStat | None:
        return self._inner.stat(name)

    def read(self, name: str, *, max_bytes: int) -> bytes:
        return self._inner.read(name, max_bytes=max_bytes)

    def read_head(self, name: str, num_bytes: int) -> tuple[bytes, FileStat]:
        return self._inner.read_head(name, num_bytes)

    def read_ranges(self, name: str, ranges: Sequence[tuple[int, int]], buffers: Any, **more: Any) -> int:
        self.read_bytes += sum(end - start for start, end in ranges)
        return self._inner.read_ranges(name, ranges, buffers, **more)


@pytest.fixture
def model(tmp_path: Path) -> tuple[dict[str, torch.Tensor], InputModel, dict[str, Load]]:
    from mergekit_ray.checkpoint.header import read_header

    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(NUM_ELEMENTS, generator=generator).bfloat16() for name in "ab"}
    folder = write_model(tmp_path / "model", tensors, {})
    stat = LocalSource(folder).stat("model.safetensors")
    assert stat is not None
    file = InputFile(stat.name, stat.num_bytes, stat.version)
    inputs = InputModel("m", "org/m", str(folder), {stat.name: file})
    header = read_header(LocalSource(folder), "model.safetensors")
    return tensors, inputs, {name: Load("m", *header.tensors[name]) for name in tensors}


def shard_of(expressions: dict[str, Expression]) -> Shard:
    specs = [TensorSpec(name, x.spec.dtype, x.spec.shape) for name, x in expressions.items()]
    [shard] = partition([specs], expressions, 1 << 40)
    return shard


def eight_experts(loads: dict[str, Load]) -> dict[str, Expression]:
    """Copies, scaled ones and noisy ones in turn, so that buffers are used on both ways out."""
    made: dict[str, Expression] = {}
    for name, load in loads.items():
        for i in range(8):
            ways = [load, Scale(load, 2.0, DType.BF16), Noise(load, "normal", 0.1, str(i), DType.BF16)]
            made[f"{name}{i}"] = ways[i % 3]
    return made


def run(shard: Shard, inputs: InputModel, source: Any, out: Path, memory_bytes: int) -> Worker:
    options = WorkerOptions(memory_bytes=memory_bytes, num_threads=2, chunk_elements=10_000)
    worker = Worker(Resources({"m": inputs}, {"m": source}, options), LocalStore(out), "records")
    worker.run(shard)
    worker.close()
    return worker


def test_eight_experts_of_one_model_are_read_once(model: Any, tmp_path: Path) -> None:
    tensors, inputs, loads = model
    shard = shard_of(eight_experts(loads))
    source = CountingSource(Path(inputs.uri))
    worker = run(shard, inputs, source, tmp_path / "out", AMPLE)
    assert source.read_bytes == 2 * NUM_BYTES
    assert worker.progress.read_bytes == shard.read_bytes == 16 * NUM_BYTES
    found = load_file(tmp_path / "out" / shard.file)
    assert all(torch.equal(found[f"{name}{i}"], tensors[name]) for name in "ab" for i in (0, 3, 6))
    assert all(torch.equal(found[f"{name}{i}"], tensors[name] * 2) for name in "ab" for i in (1, 4, 7))


@pytest.mark.parametrize("memory_bytes", [budget(1), TIGHT, budget(5 * NUM_BYTES), budget(12 * NUM_BYTES)])
def test_any_budget_gives_the_same_bytes(model: Any, tmp_path: Path, memory_bytes: int) -> None:
    _, inputs, loads = model
    shard = shard_of(eight_experts(loads))
    source = CountingSource(Path(inputs.uri))
    run(shard, inputs, source, tmp_path / "out", memory_bytes)
    run(shard, inputs, LocalSource(inputs.uri), tmp_path / "mapped", AMPLE)
    assert (tmp_path / "out" / shard.file).read_bytes() == (tmp_path / "mapped" / shard.file).read_bytes()
    assert 2 * NUM_BYTES <= source.read_bytes <= 16 * NUM_BYTES
    assert source.read_bytes % NUM_BYTES == 0


def test_with_a_budget_that_is_just_enough_all_is_read_again(model: Any, tmp_path: Path) -> None:
    _, inputs, loads = model
    source = CountingSource(Path(inputs.uri))
    run(shard_of(eight_experts(loads)), inputs, source, tmp_path / "out", TIGHT)
    assert source.read_bytes == 16 * NUM_BYTES


def test_all_buffers_are_given_back(model: Any, tmp_path: Path) -> None:
    _, inputs, loads = model
    worker = run(shard_of(eight_experts(loads)), inputs, CountingSource(Path(inputs.uri)), tmp_path / "out", AMPLE)
    idle = worker.resources.buffers.idle
    assert sum(buffer.size for buffer in idle) == worker.resources.buffers.total_bytes
    assert len({buffer.ctypes.data for buffer in idle}) == len(idle)


class TestHeldInputs:
    def test_nothing_is_reserved_where_nothing_comes_again(self, model: Any) -> None:
        _, _, loads = model
        once = list(batches(shard_of(dict(loads)), AMPLE))
        assert HeldInputs(once, AMPLE, {"m"}).reserved_bytes == 0
        again = list(batches(shard_of(eight_experts(loads)), AMPLE))
        assert HeldInputs(again, AMPLE, set()).reserved_bytes == 0
        assert HeldInputs(again, AMPLE, {"another"}).reserved_bytes == 0
        assert HeldInputs([], AMPLE, {"m"}).reserved_bytes == 0

    def test_room_is_what_batches_in_work_leave(self, model: Any) -> None:
        _, _, loads = model
        again = list(batches(shard_of(eight_experts(loads)), AMPLE))
        largest = max(sum(window.memory_bytes for window in batch) for batch in again)
        assert HeldInputs(again, 3 * largest + NUM_BYTES, {"m"}).reserved_bytes == NUM_BYTES
        assert HeldInputs(again, 3 * largest - 1, {"m"}).reserved_bytes == 0
        assert HeldInputs(again, 100 * largest, {"m"}).reserved_bytes == 2 * BufferPool.size_class(NUM_BYTES)

    def test_what_is_held_frees_its_room_with_its_last_use(self, model: Any) -> None:
        _, _, loads = model
        a, b = loads["a"], loads["b"]
        run_of = (0, NUM_ELEMENTS)
        shard = shard_of({"a0": a, "a1": a, "a2": a, "b0": b, "b1": b})
        all_batches = list(batches(shard, AMPLE))
        largest = max(sum(window.memory_bytes for window in batch) for batch in all_batches)
        held = HeldInputs(all_batches, 3 * largest + NUM_BYTES, {"m"})
        buffers = [np.empty(NUM_BYTES, dtype=np.uint8) for _ in range(2)]
        assert held.get(a, run_of) is None
        assert held.hold(a, run_of, buffers[0])
        assert held.get(a, run_of) == (buffers[0], False)
        assert not held.hold(b, run_of, buffers[1])  # no room, and not asked for yet
        assert held.get(a, run_of) == (buffers[0], True)
        assert held.get(b, run_of) is None
        assert held.hold(b, run_of, buffers[1])
        assert held.get(b, run_of) == (buffers[1], True)
        assert not held.hold(b, run_of, buffers[1])  # it does not come again

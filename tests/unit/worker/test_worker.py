"""A worker and one shard: the right bytes under a byte budget, and nothing left behind when it is stopped."""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import Interrupted, StorageError
from mergekit_ray.core.plan import InputModel, Plan, Shard
from mergekit_ray.core.record import ShardRecord, record_file
from mergekit_ray.evaluation.threads import single_threaded_torch
from mergekit_ray.planning import windows
from mergekit_ray.planning.windows import FIXED_BYTES
from mergekit_ray.reporting.progress import Progress
from mergekit_ray.storage.local.store import LocalSource
from mergekit_ray.worker.worker import Worker
from support.failures.hooked_store import HookedStore
from support.memory_inputs import DTYPES, random_llama
from support.shards import BUDGETS, files_below, long_tensors, make_worker
from support.waiting import DEADLINE_SECONDS


def run(plan: Plan, output: Path, **options: Any) -> list[ShardRecord]:
    worker = make_worker(dict(plan.inputs), output, **options)
    try:
        return [worker.run(shard) for shard in plan.shards]
    finally:
        worker.close()


def test_a_plan_carried_out_is_the_weighted_mean(plan: Plan, tmp_path: Path) -> None:
    records = run(plan, tmp_path / "out")
    a, b = random_llama(0), random_llama(1)
    merged = {name: x for shard in plan.shards for name, x in load_file(tmp_path / "out" / shard.file).items()}
    assert set(merged) == set(a)
    for name, x in merged.items():
        exact = (a[name].double() + 2 * b[name].double()) / 3
        assert x.dtype == torch.bfloat16
        # One rounding: half an ulp, 2^-9 of the value's binade, and the little that float32 lost before it.
        assert (x.double() - exact).abs().le(exact.abs() * 2.0**-8 * 1.001 + 1e-6).all()
    for shard, record in zip(plan.shards, records, strict=True):
        data = (tmp_path / "out" / shard.file).read_bytes()
        assert data.startswith(shard.header)
        assert (record.file, record.num_bytes) == (shard.file, len(data))
        assert record.sha256 == hashlib.sha256(data).hexdigest()
        body = data[len(shard.header) :]
        assert record.tensors == {
            t.spec.name: xxhash.xxh3_128(body[t.start : t.end]).hexdigest() for t in shard.tensors
        }
        stored = json.loads((tmp_path / "out" / record_file("records", shard.file)).read_text())
        assert ShardRecord.from_json(stored) == record


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("num_threads", [1, 3])
def test_any_budget_gives_the_same_bytes(
    pair: tuple[dict[str, InputModel], Shard], tmp_path: Path, budget: str, num_threads: int
) -> None:
    inputs, shard = pair
    worker = make_worker(inputs, tmp_path / "out", memory_bytes=BUDGETS[budget], num_threads=num_threads)
    worker.run(shard)
    worker.close()
    found = load_file(tmp_path / "out" / shard.file)
    (a, _, _, scalar), (b, _, integers, _) = long_tensors(0), long_tensors(1)
    exact = (a.double() + 2 * b.double()) / 3
    assert (found["big"].double() - exact).abs().le(exact.abs() * 2.0**-8 * 1.001 + 1e-6).all()
    assert torch.equal(found["copy"], b)
    assert torch.equal(found["integers"], integers)
    assert found["scalar"].item() == 5.0
    assert scalar.item() == 2.5
    for name in ("empty", "copied empty", "last"):
        assert found[name].shape == (0, 3)
    reference = tmp_path / "reference"
    alone = make_worker(inputs, reference)
    alone.run(shard)
    alone.close()
    assert (reference / shard.file).read_bytes() == (tmp_path / "out" / shard.file).read_bytes()


def test_counters_sum_up(pair: tuple[dict[str, InputModel], Shard], tmp_path: Path) -> None:
    inputs, shard = pair
    worker = make_worker(inputs, tmp_path / "out", memory_bytes=BUDGETS["tiny"])
    worker.run(shard)
    worker.close()
    progress = worker.progress
    assert progress.read_bytes == shard.read_bytes == 3 * 600_000 + 7 * 8 + 2
    assert progress.written_bytes == shard.tensors[-1].end == 2 * 600_000 + 7 * 8 + 4
    assert progress.num_tensors == len(shard.tensors)
    assert min(progress.read_seconds, progress.compute_seconds, progress.write_seconds) > 0
    total = Progress.total([progress, progress, Progress()])
    assert (total.read_bytes, total.num_tensors) == (2 * progress.read_bytes, 2 * progress.num_tensors)


def test_what_is_held_stays_within_the_budget(pair: tuple[dict[str, InputModel], Shard], tmp_path: Path) -> None:
    limit = 3 * 500_000
    assert pair[1].read_bytes + pair[1].num_bytes > 2 * limit, "not all at once"
    worker = make_worker(pair[0], tmp_path / "out", memory_bytes=FIXED_BYTES + limit)
    worker.run(pair[1])
    worker.close()
    budget = worker.resources.budget
    assert 0 < budget.peak_bytes <= limit
    assert budget.held_bytes == 0, "all was given back"


def begin(worker: Worker, shard: Shard) -> tuple[Future[ShardRecord], threading.Event]:
    """A shard run on a thread of its own, and what is set when it has been read."""
    read, future = threading.Event(), Future[ShardRecord]()

    def work() -> None:
        try:
            future.set_result(worker.run(shard, on_read=read.set))
        except BaseException as error:  # noqa: BLE001 - the test's
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future, read


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_the_next_shard_is_written_while_one_is_being_committed(
    pair: tuple[dict[str, InputModel], Shard], tmp_path: Path, budget: int
) -> None:
    inputs, shard = pair
    expected = make_worker(inputs, tmp_path / "expected").run(shard)
    let_go = threading.Event()
    store = HookedStore(tmp_path / "out", on_commit=lambda: let_go.wait(DEADLINE_SECONDS))
    worker = make_worker(inputs, store, memory_bytes=budget)
    first, first_read = begin(worker, replace(shard, file="first.safetensors"))
    assert first_read.wait(DEADLINE_SECONDS)
    second, second_read = begin(worker, replace(shard, file="second.safetensors"))
    assert second_read.wait(DEADLINE_SECONDS), "though the first is not finished"
    assert not first.done()
    let_go.set()
    assert first.result(DEADLINE_SECONDS).sha256 == second.result(DEADLINE_SECONDS).sha256 == expected.sha256
    worker.close()
    assert worker.resources.budget.held_bytes == worker.progress.held_bytes == 0
    assert worker.progress.read_bytes == 2 * shard.read_bytes
    assert worker.progress.num_tensors == 2 * len(shard.tensors)
    assert worker.resources.budget.peak_bytes <= max(
        budget - FIXED_BYTES, *(tensor.spec.num_bytes * 2 for tensor in shard.tensors)
    )


def test_a_shard_that_fails_says_once_that_it_reads_no_more_and_gives_all_back(
    pair: tuple[dict[str, InputModel], Shard], tmp_path: Path
) -> None:
    inputs, shard = pair
    read: list[str] = []
    worker = make_worker(inputs, tmp_path / "out", memory_bytes=BUDGETS["tiny"])
    worker.resources.sources = {key: FailingSource(model.uri) for key, model in inputs.items()}
    with pytest.raises(StorageError, match="the disk is on fire"):
        worker.run(shard, on_read=lambda: read.append("in the middle"))
    assert worker.resources.budget.held_bytes == 0
    worker.close()
    worker = make_worker(inputs, HookedStore(tmp_path / "out", on_open=fail), memory_bytes=BUDGETS["tiny"])
    with pytest.raises(StorageError, match="the disk is on fire"):
        worker.run(shard, on_read=lambda: read.append("before it began"))
    worker.close()
    assert read == ["in the middle", "before it began"]


def fail(*_: Any, **__: Any) -> int:
    raise StorageError("the disk is on fire", where="here", remedy="run")


class FailingSource(LocalSource):
    """Cannot be read or mapped."""

    read_ranges = map_range = fail


class SlowSource(LocalSource):
    """Reads only after a signal."""

    def __init__(self, root: str, go: threading.Event, reading: threading.Event) -> None:
        super().__init__(root)
        self.go, self.reading = go, reading

    def read_ranges(self, *args: Any, **kwargs: Any) -> int:
        self.reading.set()
        self.go.wait(DEADLINE_SECONDS)
        return super().read_ranges(*args, **kwargs)


def test_a_stop_interrupts_and_leaves_no_file(pair: tuple[dict[str, InputModel], Shard], tmp_path: Path) -> None:
    inputs, shard = pair
    worker = make_worker(inputs, tmp_path / "out", memory_bytes=BUDGETS["tiny"])
    go, reading, stop = threading.Event(), threading.Event(), threading.Event()
    worker.resources.sources = {key: SlowSource(model.uri, go, reading) for key, model in inputs.items()}
    caught: list[BaseException] = []

    def work() -> None:
        try:
            worker.run(shard, stop)
        except BaseException as error:  # noqa: BLE001 - looked at below
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert reading.wait(DEADLINE_SECONDS)
    stop.set()
    go.set()
    thread.join(DEADLINE_SECONDS)
    assert not thread.is_alive()
    worker.close()
    assert [type(error) for error in caught] == [Interrupted]
    assert files_below(tmp_path / "out") == set()


def test_a_store_that_fails_while_writing_ends_the_shard(
    pair: tuple[dict[str, InputModel], Shard], tmp_path: Path
) -> None:
    calls = itertools.count(1)

    def fail_at_the_third() -> None:
        if next(calls) == 3:
            raise StorageError("the disk is gone")

    store = HookedStore(tmp_path / "out", on_write=fail_at_the_third)
    worker = make_worker(pair[0], store, memory_bytes=BUDGETS["tiny"])
    with pytest.raises(StorageError, match="the disk is gone"):
        worker.run(pair[1])
    worker.close()
    assert files_below(tmp_path / "out") == set()


def test_windows_were_smaller_than_the_tensor(pair: tuple[dict[str, InputModel], Shard]) -> None:
    """What the tests above rely on."""
    sizes: Sequence[int] = [
        window.num_elements
        for batch in windows.batches(pair[1], BUDGETS["tiny"])
        for window in batch
        if window.tensor.spec.name == "big"
    ]
    assert len(sizes) > 2
    assert sum(sizes) == 300_000
    assert DTYPES[torch.bfloat16] is DType.BF16


def test_torch_has_its_threads_back() -> None:
    before = torch.get_num_threads()
    with single_threaded_torch():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before

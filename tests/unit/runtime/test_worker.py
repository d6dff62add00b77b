"""A worker and one shard: the right bytes under a byte budget, and nothing left behind when it is stopped."""

from __future__ import annotations

import hashlib
import json
import os
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

from mergekit_ray.checkpoint.header import read_header
from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.errors import CheckpointError, Interrupted, MergeError, StorageError
from mergekit_ray.core.expressions import Expression, Load, Merge, Scale
from mergekit_ray.core.plan import InputFile, InputModel, Plan, Shard
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.core.tensors import TensorSpec
from mergekit_ray.planning import windows
from mergekit_ray.planning.partition import partition
from mergekit_ray.planning.windows import FIXED_BYTES
from mergekit_ray.runtime import shard_run, window_inputs
from mergekit_ray.runtime import worker as worker_module
from mergekit_ray.runtime.budget import Budget
from mergekit_ray.runtime.local import open_sources
from mergekit_ray.runtime.progress import Progress
from mergekit_ray.runtime.threads import single_threaded_torch
from mergekit_ray.runtime.worker import Worker, WorkerOptions, record_name
from mergekit_ray.storage.local import LocalSource, LocalStore
from mergekit_ray.storage.local_upload import LocalUpload
from support.memory_inputs import DTYPES, random_llama, write_model

MIB = 1 << 20


def make_worker(plan_inputs: dict[str, InputModel], output: Path, **options: Any) -> Worker:
    chosen = WorkerOptions(**{"memory_bytes": FIXED_BYTES + 64 * MIB, **options})
    return Worker(plan_inputs, open_sources(plan_inputs), LocalStore(output), "records", chosen)


def run(plan: Plan, output: Path, **options: Any) -> list[ShardRecord]:
    worker = make_worker(dict(plan.inputs), output, **options)
    try:
        return [worker.run(shard) for shard in plan.shards]
    finally:
        worker.close()


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


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
        stored = json.loads((tmp_path / "out" / record_name("records", shard)).read_text())
        assert ShardRecord.from_json(stored) == record


def big_model(folder: Path, *tensors: torch.Tensor, content: bytes | None = None) -> InputModel:
    names = [f"t{i}" for i in range(len(tensors))]
    write_model(folder, dict(zip(names, tensors, strict=True)), {})
    if content is not None:
        (folder / "model.safetensors").write_bytes(content)
    stat = LocalSource(folder).stat("model.safetensors")
    assert stat is not None
    file = InputFile(stat.name, stat.num_bytes, stat.version)
    return InputModel(folder.name, f"org/{folder.name}", str(folder), {stat.name: file})


def load_of(model: InputModel, name: str) -> Load:
    spec, location = read_header(LocalSource(model.uri), "model.safetensors").tensors[name]
    return Load(model.key, spec, location)


def merged(name: str, *inputs: Load) -> Merge:
    spec = TensorSpec(name, DType.BF16, inputs[0].spec.shape)
    weights = tuple({"weight": float(i + 1)} for i in range(len(inputs)))
    return Merge("linear", spec, inputs, None, {}, weights, ("",) * len(inputs))


def shard_of(*expressions: tuple[str, Expression]) -> Shard:
    specs = [TensorSpec(name, x.spec.dtype, x.spec.shape) for name, x in expressions]
    [shard] = partition([specs], dict(expressions), 1 << 40)
    return shard


def long_tensors(seed: int, num_elements: int = 300_000) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    big = torch.randn(num_elements, generator=generator).to(torch.bfloat16)
    return [big, torch.zeros(0, 3, dtype=torch.bfloat16), torch.arange(7), torch.tensor(2.5, dtype=torch.bfloat16)]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[dict[str, InputModel], Shard]:
    """A shard of windows smaller than tensors, empty tensors, copies, scalars and integers."""
    a, b = (big_model(tmp_path / name, *long_tensors(i)) for i, name in enumerate("ab"))
    shard = shard_of(
        ("big", merged("big", load_of(a, "t0"), load_of(b, "t0"))),
        ("empty", merged("empty", load_of(a, "t1"), load_of(b, "t1"))),
        ("copied empty", load_of(a, "t1")),
        ("integers", load_of(b, "t2")),
        ("scalar", Scale(load_of(a, "t3"), 2.0, DType.F32)),
        ("copy", load_of(b, "t0")),
        ("last", load_of(b, "t1")),
    )
    return {"a": a, "b": b}, shard


def karcher(name: str, *inputs: Load) -> Merge:
    """What must be seen as a whole, and is one window."""
    spec = TensorSpec(name, DType.BF16, inputs[0].spec.shape)
    return Merge("karcher", spec, inputs, None, {}, ({},) * len(inputs), ("",) * len(inputs))


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_window_of_many_parts_is_the_same_as_one_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    models = [big_model(tmp_path / name, *long_tensors(i)) for i, name in enumerate("ab")]
    inputs = {model.key: model for model in models}
    shard = shard_of(("big", karcher("big", *(load_of(model, "t0") for model in models))))
    whole = make_worker(inputs, tmp_path / "whole").run(shard)
    assert whole.tensors
    monkeypatch.setattr("mergekit_ray.runtime.parts._PART_BYTES", 1)
    in_parts = make_worker(inputs, tmp_path / "cut", num_threads=num_threads).run(shard)
    assert (in_parts.sha256, in_parts.tensors) == (whole.sha256, whole.tensors)


@pytest.mark.parametrize("place", [0, 299_999])
def test_what_is_not_finite_in_any_part_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    monkeypatch.setattr("mergekit_ray.runtime.parts._PART_BYTES", 1)
    tensors = [long_tensors(i)[0] for i in range(2)]
    tensors[1][place] = torch.nan
    models = [big_model(tmp_path / name, tensor) for name, tensor in zip("ab", tensors, strict=True)]
    shard = shard_of(("big", karcher("big", *(load_of(model, "t0") for model in models))))
    with pytest.raises(MergeError, match=f"flat index {place} "):
        make_worker({model.key: model for model in models}, tmp_path / "out").run(shard)
    assert files_below(tmp_path / "out") == set()


def test_tensors_at_odd_places_of_a_file(tmp_path: Path) -> None:
    """The format allows headers of any length; numbers then lie where no processor would put them."""
    data = [torch.randn(90_001, generator=torch.Generator().manual_seed(i)).to(torch.bfloat16) for i in range(2)]
    models = []
    for name, tensor in zip("ab", data, strict=True):
        big_model(tmp_path / "even" / name, tensor)
        content = (tmp_path / "even" / name / "model.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        spaced = (length + 1).to_bytes(8, "little") + content[8 : 8 + length] + b" " + content[8 + length :]
        models.append(big_model(tmp_path / name, tensor, content=spaced))
    loads = [load_of(model, "t0") for model in models]
    assert all(load.location.start % 2 for load in loads)
    shard = shard_of(("t0", merged("t0", *loads)))
    worker = make_worker({model.key: model for model in models}, tmp_path / "out")
    worker.run(shard)
    worker.close()
    exact = (data[0].double() + 2 * data[1].double()) / 3
    found = load_file(tmp_path / "out" / shard.file)["t0"]
    assert (found.double() - exact).abs().le(exact.abs() * 2.0**-8 * 1.001 + 1e-6).all()


BUDGETS = {"tiny": FIXED_BYTES + 3 * 500_000, "one byte": FIXED_BYTES + 1, "ample": FIXED_BYTES + 64 * MIB}


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


def test_what_is_held_stays_within_the_budget(
    pair: tuple[dict[str, InputModel], Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 3 * 500_000
    held: list[int] = []

    class Watched(Budget):
        def take(self, num_bytes: int, stopped: threading.Event) -> None:
            super().take(num_bytes, stopped)
            held.append(self._held)

        def give(self, num_bytes: int) -> None:
            super().give(num_bytes)
            held.append(self._held)

    monkeypatch.setattr(worker_module, "Budget", Watched)
    worker = make_worker(pair[0], tmp_path / "out", memory_bytes=FIXED_BYTES + limit)
    worker.run(pair[1])
    worker.close()
    assert max(held) <= limit
    assert len(held) > 10, "several batches"
    assert held[-1] == 0, "all was given back"
    assert min(held) >= 0


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
    pair: tuple[dict[str, InputModel], Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    inputs, shard = pair
    expected = make_worker(inputs, tmp_path / "expected").run(shard)
    held: list[int] = []

    class Watched(Budget):
        def take(self, num_bytes: int, stopped: threading.Event) -> None:
            super().take(num_bytes, stopped)
            held.append(self._held)

    commit, let_go = LocalUpload.commit, threading.Event()

    def wait_and_commit(upload: LocalUpload) -> Any:
        assert let_go.wait(60)
        return commit(upload)

    monkeypatch.setattr(worker_module, "Budget", Watched)
    monkeypatch.setattr(LocalUpload, "commit", wait_and_commit)
    worker = make_worker(inputs, tmp_path / "out", memory_bytes=budget)
    first, first_read = begin(worker, replace(shard, file="first.safetensors"))
    assert first_read.wait(60)
    second, second_read = begin(worker, replace(shard, file="second.safetensors"))
    assert second_read.wait(60), "though the first is not finished"
    assert not first.done()
    let_go.set()
    assert first.result(60).sha256 == second.result(60).sha256 == expected.sha256
    worker.close()
    assert worker.budget.held_bytes == worker.progress.held_bytes == 0
    assert worker.progress.read_bytes == 2 * shard.read_bytes
    assert worker.progress.num_tensors == 2 * len(shard.tensors)
    assert max(held) <= max(budget - FIXED_BYTES, *(tensor.spec.num_bytes * 2 for tensor in shard.tensors))


def test_a_shard_that_fails_says_once_that_it_reads_no_more_and_gives_all_back(
    pair: tuple[dict[str, InputModel], Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, shard = pair
    read: list[str] = []
    worker = make_worker(inputs, tmp_path / "out", memory_bytes=BUDGETS["tiny"])
    worker.sources = {key: FailingSource(model.uri) for key, model in inputs.items()}
    with pytest.raises(StorageError, match="the disk is on fire"):
        worker.run(shard, on_read=lambda: read.append("in the middle"))
    assert worker.budget.held_bytes == 0
    monkeypatch.setattr(worker_module, "ShardWriter", fail)
    with pytest.raises(StorageError, match="the disk is on fire"):
        worker.run(shard, on_read=lambda: read.append("before it began"))
    worker.close()
    assert read == ["in the middle", "before it began"]


def fail(*_: Any, **__: Any) -> int:
    raise StorageError("the disk is on fire", where="here", remedy="run")


class FailingSource(LocalSource):
    """Cannot be read or mapped."""

    read_ranges = map_range = fail


def test_a_damaged_input_leaves_nothing_and_names_the_model(tmp_path: Path) -> None:
    tensors = long_tensors(0)
    tensors[0][200_000] = float("nan")
    model = big_model(tmp_path / "a", *tensors)
    output = tmp_path / "out"
    worker = make_worker({"a": model}, output, memory_bytes=BUDGETS["tiny"])
    for expression in (merged("w", load_of(model, "t0")), load_of(model, "t0")):
        with pytest.raises(MergeError, match="first at flat index 200000") as caught:
            worker.run(shard_of(("w", expression)))
        assert caught.value.where == "model org/a, tensor 't0'"
        assert files_below(output) == set()
    # The worker is fit for the next shard.
    worker.run(shard_of(("fine", load_of(model, "t2"))))
    assert worker.buffers._total_bytes <= 3 * 500_000
    worker.close()
    tolerant = make_worker({"a": model}, output, allow_non_finite=True)
    tolerant.run(shard_of(("w", load_of(model, "t0"))))
    tolerant.close()


def test_an_input_that_changed_is_refused(pair: tuple[dict[str, InputModel], Shard], tmp_path: Path) -> None:
    inputs, shard = pair
    path = tmp_path / "a" / "model.safetensors"
    path.write_bytes(path.read_bytes())
    os.utime(path, ns=(1, 1))
    worker = make_worker(inputs, tmp_path / "out")
    with pytest.raises(CheckpointError, match="changed"):
        worker.run(shard)
    worker.close()
    assert files_below(tmp_path / "out") == set()


@pytest.mark.parametrize("smallest", [0, 1 << 40], ids=["mapped", "copied"])
def test_inputs_used_where_they_lie_give_the_same_bytes(
    pair: tuple[dict[str, InputModel], Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smallest: int
) -> None:
    inputs, shard = pair
    expected = make_worker(inputs, tmp_path / "expected").run(shard)
    monkeypatch.setattr(window_inputs, "MIN_MAPPED_BYTES", smallest)
    assert make_worker(inputs, tmp_path / "out").run(shard).sha256 == expected.sha256


def test_an_input_that_changes_while_it_is_used_is_refused(
    pair: tuple[dict[str, InputModel], Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, shard = pair
    monkeypatch.setattr(window_inputs, "MIN_MAPPED_BYTES", 0)
    compute = shard_run.ShardRun._compute

    def touch_and_compute(*args: Any) -> Any:
        os.utime(tmp_path / "a" / "model.safetensors", ns=(1, 1))
        return compute(*args)

    monkeypatch.setattr(shard_run.ShardRun, "_compute", touch_and_compute)
    with pytest.raises(CheckpointError, match="changed"):
        make_worker(inputs, tmp_path / "out").run(shard)
    assert files_below(tmp_path / "out") == set()


class SlowSource(LocalSource):
    """Reads only after a signal."""

    def __init__(self, root: str, go: threading.Event, reading: threading.Event) -> None:
        super().__init__(root)
        self.go, self.reading = go, reading

    def read_ranges(self, *args: Any, **kwargs: Any) -> int:
        self.reading.set()
        self.go.wait(10)
        return super().read_ranges(*args, **kwargs)


def test_a_stop_interrupts_and_leaves_no_file(pair: tuple[dict[str, InputModel], Shard], tmp_path: Path) -> None:
    inputs, shard = pair
    worker = make_worker(inputs, tmp_path / "out", memory_bytes=BUDGETS["tiny"])
    go, reading, stop = threading.Event(), threading.Event(), threading.Event()
    worker.sources = {key: SlowSource(model.uri, go, reading) for key, model in inputs.items()}
    caught: list[BaseException] = []

    def work() -> None:
        try:
            worker.run(shard, stop)
        except BaseException as error:  # noqa: BLE001 - looked at below
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    assert reading.wait(10)
    stop.set()
    go.set()
    thread.join(10)
    assert not thread.is_alive()
    worker.close()
    assert [type(error) for error in caught] == [Interrupted]
    assert files_below(tmp_path / "out") == set()


def test_a_store_that_fails_while_writing_ends_the_shard(
    pair: tuple[dict[str, InputModel], Shard], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = LocalUpload.write, 0

    def failing(self: LocalUpload, data: memoryview | bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise StorageError("the disk is gone")
        write(self, data)

    monkeypatch.setattr(LocalUpload, "write", failing)
    worker = make_worker(pair[0], tmp_path / "out", memory_bytes=BUDGETS["tiny"])
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

"""What the driver makes of its actors' answers, with a Ray that answers as it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Load
from mergekit_ray.core.plan import OutputTensor, Shard
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.executors import ray_executor as ray_runtime
from mergekit_ray.executors.driver import Job, Outcome
from mergekit_ray.executors.ray_executor import Arrivals, RayExecutor
from mergekit_ray.worker.resources import WorkerOptions


class FakeRay:
    """Actors whose calls end when `answer` is called. A call is its method's name and a number."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.calls: list[str] = []

    def actor(self, name: str) -> SimpleNamespace:
        """Something with the methods of `RayWorker`."""

        def method(method_name: str) -> SimpleNamespace:
            return SimpleNamespace(remote=lambda *_: self._call(f"{name}.{method_name}"))

        return SimpleNamespace(**{each: method(each) for each in ("run", "has_read", "node", "progress", "stop")})

    def answer(self, call: str, value: Any) -> None:
        """End a call."""
        assert call in self.calls
        self.answers[call] = value

    def wait(self, refs: Sequence[str], *, num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        """See `ray.wait`."""
        done = [ref for ref in refs if ref in self.answers][:num_returns]
        return done, [ref for ref in refs if ref not in done]

    def get(self, ref: str, timeout: float | None = None) -> Any:
        """See `ray.get`."""
        value = self.answers[ref]
        if isinstance(value, Exception):
            raise value
        return value

    def _call(self, name: str) -> str:
        call = f"{name} {sum(each.startswith(f'{name} ') for each in self.calls)}"
        self.calls.append(call)
        return call


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    """In Ray's place."""
    fake = FakeRay()
    actors = iter("abc")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "put", lambda _: object())
    monkeypatch.setattr(ray, "wait", fake.wait)
    monkeypatch.setattr(ray, "get", fake.get)
    monkeypatch.setattr(ray, "kill", lambda _: None)
    monkeypatch.setattr(ray_runtime, "head_address", lambda: "head")
    monkeypatch.setattr(ray_runtime, "is_listening", lambda _: True)
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}]
    monkeypatch.setattr(ray_runtime, "compute_nodes", lambda: nodes)
    monkeypatch.setattr(ray_runtime, "RayMetrics", lambda *_: None)
    made = SimpleNamespace(remote=lambda *_: fake.actor(next(actors)))
    monkeypatch.setattr(ray_runtime, "RayWorker", SimpleNamespace(options=lambda **_: made))
    return fake


def executor_of(num_workers: int) -> RayExecutor:
    executor = RayExecutor(num_workers=num_workers, cpus_per_worker=1)
    executor.start(Job({}, "out", "records", WorkerOptions(memory_bytes=1)), num_shards=8)
    return executor


def with_two_shards(fake: FakeRay) -> RayExecutor:
    """One actor, which has read its first shard and is reading its second."""
    executor = executor_of(1)
    fake.answer("a.node 0", "10.0.0.1")
    executor.wait(0)
    executor.submit(shard("first"))
    fake.answer("a.has_read 0", "10.0.0.1")
    executor.wait(0)
    executor.submit(shard("second"))
    return executor


def shard(file: str) -> Shard:
    spec = TensorSpec("x", DType.F32, (2,))
    load = Load("m0", spec, Location("in.safetensors", 0, spec.num_bytes))
    return Shard(file, b"header", (OutputTensor(spec, load, 0, spec.num_bytes),))


def record(file: str) -> ShardRecord:
    return ShardRecord(file, 1, "0" * 64, {})


def test_an_actor_is_given_the_next_shard_once_it_has_read_one(fake: FakeRay) -> None:
    executor = executor_of(1)
    assert (executor.num_workers, executor.idle()) == (0, 0)
    fake.answer("a.node 0", "10.0.0.1")
    assert executor.wait(0) == []
    assert (executor.num_workers, executor.idle()) == (1, 1)
    executor.submit(shard("first"))
    assert (executor.num_workers, executor.idle()) == (1, 0)
    fake.answer("a.has_read 0", "10.0.0.1")
    assert executor.wait(0) == []
    assert executor.idle() == 1
    executor.submit(shard("second"))
    fake.answer("a.has_read 1", "10.0.0.1")
    assert executor.wait(0) == []
    assert executor.idle() == 0, "one is being written, one computed"
    fake.answer("a.run 1", record("second"))
    assert executor.wait(0) == [Outcome("second", "worker-0 on 10.0.0.1", record=record("second"))]
    assert executor.idle() == 1
    executor.close()


def test_an_actor_without_shards_comes_first(fake: FakeRay) -> None:
    executor = executor_of(2)
    for name in "ab":
        fake.answer(f"{name}.node 0", name)
    executor.wait(0)
    executor.submit(shard("first"))
    fake.answer("a.has_read 0", "a")
    executor.wait(0)
    assert executor.idle() == 2
    executor.submit(shard("second"))
    assert "b.run 0" in fake.calls
    assert "a.run 1" not in fake.calls
    executor.close()


@pytest.mark.parametrize("is_told_first", ["run", "has_read"])
def test_with_an_actor_all_its_shards_are_lost(
    fake: FakeRay, monkeypatch: pytest.MonkeyPatch, is_told_first: str
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    executor = with_two_shards(fake)
    died = RayActorError()
    if is_told_first == "has_read":
        fake.answer("a.has_read 1", died)
        assert executor.wait(0) == []
    fake.answer("a.run 0", died)
    outcomes = executor.wait(0)
    assert [(outcome.file, outcome.lost) for outcome in outcomes] == [("first", True), ("second", True)]
    assert all("worker-0 on 10.0.0.1 was lost" in outcome.error.what for outcome in outcomes if outcome.error)
    assert (executor.num_workers, executor.idle()) == (0, 0)
    fake.answer("a.run 1", died)
    assert executor.wait(0) == [], "that is known"
    # Ray brings it up again.
    restarted = [call for call in fake.calls if call.startswith("a.node")][-1]
    fake.answer(restarted, "10.0.0.2")
    executor.wait(0)
    assert (executor.num_workers, executor.idle()) == (1, 1)
    executor.close()


def test_what_was_finished_before_the_actor_died_counts(fake: FakeRay) -> None:
    executor = with_two_shards(fake)
    fake.answer("a.run 0", record("first"))
    fake.answer("a.run 1", RayActorError())
    outcomes = executor.wait(0)
    assert [(outcome.file, outcome.lost) for outcome in outcomes] == [("first", False), ("second", True)]
    executor.close()


def test_arrivals_are_waited_for_once_each() -> None:
    arrivals, passed = Arrivals(), []
    arrivals.add("early")
    arrivals.wait_for("early")

    def wait() -> None:
        for name in ("late", "early"):
            arrivals.wait_for(name)
            passed.append(name)

    thread = threading.Thread(target=wait)
    thread.start()
    arrivals.add("early")
    assert passed == []
    arrivals.add("late")
    thread.join(10)
    assert passed == ["late", "early"]

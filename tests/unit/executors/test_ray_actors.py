"""What the driver makes of its actors' answers, over a Ray that answers as it is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import cast

import pytest
from ray.exceptions import RayActorError

from mergekit_ray.core.dtypes import DType
from mergekit_ray.core.expressions import Load
from mergekit_ray.core.plan import OutputTensor, Shard
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.core.tensors import Location, TensorSpec
from mergekit_ray.executors.driver import Job, Outcome
from mergekit_ray.executors.ray_cluster import Cluster
from mergekit_ray.executors.ray_executor import RayExecutor
from mergekit_ray.executors.ray_worker import Arrivals
from mergekit_ray.executors.watch import Standing
from mergekit_ray.reporting.progress import Progress
from mergekit_ray.worker.resources import WorkerOptions
from support.fake_ray import FakeCluster
from support.waiting import DEADLINE_SECONDS


@pytest.fixture
def fake() -> FakeCluster:
    return FakeCluster()


def executor_of(fake: FakeCluster, num_workers: int, clock: Callable[[], float] = time.monotonic) -> RayExecutor:
    executor = RayExecutor(cast(Cluster, fake), num_workers, cpus_per_worker=1, clock=clock)
    executor.start(Job({}, "out", "records", WorkerOptions(memory_bytes=1)), num_shards=8)
    return executor


def with_two_shards(fake: FakeCluster) -> RayExecutor:
    """One actor, which has read its first shard and is reading its second."""
    executor = executor_of(fake, 1)
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


def test_an_actor_is_given_the_next_shard_once_it_has_read_one(fake: FakeCluster) -> None:
    executor = executor_of(fake, 1)
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
    written = Outcome("second", "worker-0 on 10.0.0.1", record=record("second"), place="10.0.0.1")
    assert executor.wait(0) == [written]
    assert executor.idle() == 1
    executor.close()


def test_an_actor_without_shards_comes_first(fake: FakeCluster) -> None:
    executor = executor_of(fake, 2)
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
def test_with_an_actor_all_its_shards_are_lost(fake: FakeCluster, is_told_first: str) -> None:
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


def test_what_was_finished_before_the_actor_died_counts(fake: FakeCluster) -> None:
    executor = with_two_shards(fake)
    fake.answer("a.run 0", record("first"))
    fake.answer("a.run 1", RayActorError())
    outcomes = executor.wait(0)
    assert [(outcome.file, outcome.lost) for outcome in outcomes] == [("first", False), ("second", True)]
    executor.close()


class TestStandings:
    """How actors are doing, by what they answer."""

    def test_who_does_not_answer_is_silent_and_who_does_no_more_is_still(self, fake: FakeCluster) -> None:
        now = [100.0]
        executor = executor_of(fake, 2, lambda: now[0])
        for name in "ab":
            fake.answer(f"{name}.node 0", name)
        executor.wait(0)
        executor.submit(shard("first"))
        executor.submit(shard("second"))
        executor.progress()
        now[0] += 7
        fake.answer("b.progress 0", Progress(read_bytes=5))
        executor.progress()
        first, second = executor.standings()
        assert first == Standing("a", "worker-0 on a", ("first",), silent_seconds=7, still_seconds=7)
        assert second == Standing("b", "worker-1 on b", ("second",), silent_seconds=0, still_seconds=0)
        executor.progress()
        now[0] += 2
        fake.answer("b.progress 1", Progress(read_bytes=5, held_bytes=3))
        executor.progress()
        assert executor.standings()[1].still_seconds == 2, "what it holds is nothing that it has done"
        executor.close()

    def test_one_that_is_given_up_is_ended_and_replaced(self, fake: FakeCluster) -> None:
        executor = with_two_shards(fake)
        executor.give_up("10.0.0.1")
        assert fake.killed == ["a"]
        outcomes = executor.wait(0)
        assert [(each.file, each.lost, each.place) for each in outcomes] == [
            ("first", True, "10.0.0.1"),
            ("second", True, "10.0.0.1"),
        ]
        assert (executor.num_workers, executor.standings()) == (0, [])
        fake.answer("a.run 0", record("first"))
        assert executor.wait(0) == [], "nobody listens to it any more"
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
    thread.join(DEADLINE_SECONDS)
    assert passed == ["late", "early"]

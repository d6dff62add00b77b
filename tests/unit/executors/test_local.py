"""The local executor: threads that obey, and one that does not."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from mergekit_ray.core.errors import Interrupted
from mergekit_ray.core.plan import Plan, Shard
from mergekit_ray.executors.driver import Job
from mergekit_ray.executors.local import LocalExecutor
from mergekit_ray.planning.windows import FIXED_BYTES
from mergekit_ray.storage.protocols import Sink
from mergekit_ray.worker.resources import Resources, WorkerOptions
from mergekit_ray.worker.worker import Worker
from support.failures.hooked_store import HookedStore
from support.waiting import DEADLINE_SECONDS, wait_until


def started(plan: Plan, out: Path, num_workers: int, **options: Any) -> LocalExecutor:
    executor = LocalExecutor(num_workers, **options)
    options_of_workers = WorkerOptions(FIXED_BYTES + (1 << 20))
    executor.start(Job(plan.inputs, str(out), ".mergekit-ray/x", options_of_workers), len(plan.shards))
    return executor


def test_shards_given_after_a_stop_are_not_begun(plan: Plan, tmp_path: Path) -> None:
    executor = started(plan, tmp_path / "out", 2)
    executor.stop()
    executor.submit(plan.shards[0])
    # It may say first that it reads no more.
    [outcome] = executor.wait(DEADLINE_SECONDS) or executor.wait(DEADLINE_SECONDS)
    executor.close()
    assert isinstance(outcome.error, Interrupted)
    assert list((tmp_path / "out").rglob("*")) == []


def test_a_thread_that_hangs_is_not_waited_for(plan: Plan, tmp_path: Path) -> None:
    let_go, begun = threading.Event(), threading.Event()

    class Hanging(Worker):
        def run(self, *_: Any) -> Any:
            begun.set()
            let_go.wait(DEADLINE_SECONDS)

    before = set(threading.enumerate())
    executor = started(plan, tmp_path / "out", 1, worker=Hanging, hanging_seconds=0.01)
    threads = [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("worker-0")]
    executor.submit(plan.shards[0])
    assert begun.wait(DEADLINE_SECONDS)
    executor.stop()
    executor.close()
    # All but the one that hangs end by themselves, but may need longer than they are waited for.
    wait_until(lambda: sum(thread.is_alive() for thread in threads) == 1)
    let_go.set()
    for thread in threads:
        thread.join(DEADLINE_SECONDS)
        assert not thread.is_alive()


def test_a_worker_takes_the_next_shard_while_it_finishes_one(plan: Plan, tmp_path: Path) -> None:
    let_go = threading.Event()

    def waiting(resources: Resources, sink: Sink, record_folder: str) -> Worker:
        store = HookedStore(Path(sink.uri), on_commit=lambda: let_go.wait(DEADLINE_SECONDS))
        return Worker(resources, store, record_folder)

    executor = started(plan, tmp_path / "out", 1, worker=waiting)
    for shard in plan.shards[:2]:
        assert executor.idle() == 1
        executor.submit(shard)
        assert executor.idle() == 0
        assert executor.wait(DEADLINE_SECONDS) == [], "it is only told that the shard has been read"
    assert executor.idle() == 0, "two are in work"
    let_go.set()
    ended = [*executor.wait(DEADLINE_SECONDS)]
    assert executor.idle() == 1
    if len(ended) == 1:
        ended += executor.wait(DEADLINE_SECONDS)
    executor.close()
    assert {outcome.file for outcome in ended if outcome.record} == {shard.file for shard in plan.shards[:2]}


def test_shards_are_given_to_who_has_least_to_do(plan: Plan, tmp_path: Path) -> None:
    let_go, given = threading.Event(), []

    class Waiting(Worker):
        def run(self, shard: Shard, stop: Any = None, on_read: Any = None) -> Any:
            given.append(self)
            on_read()
            let_go.wait(DEADLINE_SECONDS)

    executor = started(plan, tmp_path / "out", 2, worker=Waiting)
    for shard in (*plan.shards, plan.shards[0])[:4]:
        executor.submit(shard)
        assert executor.wait(DEADLINE_SECONDS) == []
    assert executor.idle() == 0
    let_go.set()
    executor.close()
    assert len(plan.shards) >= 3
    assert given[0] is not given[1]
    assert {given[2], given[3]} == {given[0], given[1]}

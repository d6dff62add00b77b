"""The local executor: threads that obey, and one that does not."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from mergekit_ray.core.errors import Interrupted
from mergekit_ray.core.plan import Plan, Shard
from mergekit_ray.executors import local
from mergekit_ray.executors.driver import Job
from mergekit_ray.executors.local import LocalExecutor
from mergekit_ray.planning.windows import FIXED_BYTES
from mergekit_ray.storage.local.upload import LocalUpload
from mergekit_ray.worker.resources import WorkerOptions
from mergekit_ray.worker.worker import Worker


def started(plan: Plan, out: Path, num_workers: int) -> LocalExecutor:
    executor = LocalExecutor(num_workers)
    options = WorkerOptions(FIXED_BYTES + (1 << 20))
    executor.start(Job(plan.inputs, str(out), ".mergekit-ray/x", options), len(plan.shards))
    return executor


def test_shards_given_after_a_stop_are_not_begun(plan: Plan, tmp_path: Path) -> None:
    executor = started(plan, tmp_path / "out", 2)
    executor.stop()
    executor.submit(plan.shards[0])
    [outcome] = executor.wait(10) or executor.wait(10)  # it may say first that it reads no more
    executor.close()
    assert isinstance(outcome.error, Interrupted)
    assert list((tmp_path / "out").rglob("*")) == []


def test_a_thread_that_hangs_is_not_waited_for(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go, begun = threading.Event(), threading.Event()

    def hang(self: Worker, shard: Shard, stop: Any, on_read: Any) -> None:
        begun.set()
        let_go.wait(60)

    monkeypatch.setattr(Worker, "run", hang)
    monkeypatch.setattr(local, "_HANGING_SECONDS", 0.01)
    executor = started(plan, tmp_path / "out", 1)
    executor.submit(plan.shards[0])
    assert begun.wait(10)
    executor.stop()
    executor.close()
    [seat] = executor._seats
    assert sum(thread.is_alive() for thread in seat.threads) == 1
    let_go.set()
    for thread in seat.threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_worker_takes_the_next_shard_while_it_finishes_one(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, let_go = LocalUpload.commit, threading.Event()

    def wait_and_commit(upload: LocalUpload) -> Any:
        assert let_go.wait(60)
        return commit(upload)

    monkeypatch.setattr(LocalUpload, "commit", wait_and_commit)
    executor = started(plan, tmp_path / "out", 1)
    for shard in plan.shards[:2]:
        assert executor.idle() == 1
        executor.submit(shard)
        assert executor.idle() == 0
        assert executor.wait(10) == [], "it is only told that the shard has been read"
    assert executor.idle() == 0, "two are in work"
    let_go.set()
    ended = [*executor.wait(10)]
    assert executor.idle() == 1
    if len(ended) == 1:
        ended += executor.wait(10)
    executor.close()
    assert {outcome.file for outcome in ended if outcome.record} == {shard.file for shard in plan.shards[:2]}


def test_shards_are_given_to_who_has_least_to_do(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go, given = threading.Event(), []

    def read_and_wait(self: Worker, shard: Shard, stop: Any, on_read: Any) -> None:
        given.append(self)
        on_read()
        let_go.wait(60)

    monkeypatch.setattr(Worker, "run", read_and_wait)
    executor = started(plan, tmp_path / "out", 2)
    for shard in (*plan.shards, plan.shards[0])[:4]:
        executor.submit(shard)
        assert executor.wait(10) == []
    assert executor.idle() == 0
    let_go.set()
    executor.close()
    assert len(plan.shards) >= 3
    assert given[0] is not given[1]
    assert {given[2], given[3]} == {given[0], given[1]}

"""The local executor: threads that obey, and one that does not."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from mergekit_ray.core.errors import Interrupted
from mergekit_ray.core.plan import Plan, Shard
from mergekit_ray.planning.windows import FIXED_BYTES
from mergekit_ray.runtime import local
from mergekit_ray.runtime.driver import Job
from mergekit_ray.runtime.local import LocalExecutor
from mergekit_ray.runtime.worker import Worker, WorkerOptions


def started(plan: Plan, out: Path, num_workers: int) -> LocalExecutor:
    executor = LocalExecutor(num_workers)
    options = WorkerOptions(FIXED_BYTES + (1 << 20))
    executor.start(Job(plan.inputs, str(out), ".mergekit-ray/x", options), len(plan.shards))
    return executor


def test_shards_given_after_a_stop_are_not_begun(plan: Plan, tmp_path: Path) -> None:
    executor = started(plan, tmp_path / "out", 2)
    executor.stop()
    executor.submit(plan.shards[0])
    [outcome] = executor.wait(10)
    executor.close()
    assert isinstance(outcome.error, Interrupted)
    assert list((tmp_path / "out").rglob("*")) == []


def test_a_thread_that_hangs_is_not_waited_for(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go, begun = threading.Event(), threading.Event()

    def hang(self: Worker, shard: Shard, stop: Any = None) -> None:
        begun.set()
        let_go.wait(60)

    monkeypatch.setattr(Worker, "run", hang)
    monkeypatch.setattr(local, "_HANGING_SECONDS", 0.01)
    executor = started(plan, tmp_path / "out", 1)
    executor.submit(plan.shards[0])
    assert begun.wait(10)
    executor.stop()
    executor.close()
    [thread] = executor._threads
    assert thread.is_alive()
    let_go.set()
    thread.join(10)
    assert not thread.is_alive()

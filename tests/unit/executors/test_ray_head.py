"""A head node that is gone is not asked for anything: Ray's answer to that is to end the process."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest
import ray

from mergekit_ray.core.errors import StorageError
from mergekit_ray.executors import ray_executor as ray_runtime
from mergekit_ray.executors.driver import Job
from mergekit_ray.executors.ray_cluster import is_listening
from mergekit_ray.executors.ray_executor import RayExecutor
from mergekit_ray.worker.resources import WorkerOptions


class Clock:
    """Seconds that pass when told to."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(ray_runtime, "time", clock)
    return clock


def executor_with_head(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> RayExecutor:
    """An executor whose head node is a socket, with one worker that never comes up."""
    address = "127.0.0.1:{1}".format(*listener.getsockname())

    def nodes() -> list[dict[str, object]]:
        assert is_listening(address), "asked a head node that is gone"
        return [{"Alive": True, "Resources": {"CPU": 1.0}}]

    worker = SimpleNamespace(node=SimpleNamespace(remote=object))
    made = SimpleNamespace(remote=lambda *_: worker)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "put", lambda _: object())
    monkeypatch.setattr(ray, "wait", lambda refs, **_: ([], refs))
    monkeypatch.setattr(ray_runtime, "head_address", lambda: address)
    monkeypatch.setattr(ray_runtime, "compute_nodes", nodes)
    monkeypatch.setattr(ray_runtime, "RayMetrics", lambda *_: None)
    monkeypatch.setattr(ray_runtime, "RayWorker", SimpleNamespace(options=lambda **_: made))
    executor = RayExecutor()
    executor.start(Job({}, "out", "records", WorkerOptions(memory_bytes=1)), num_shards=4)
    return executor


def test_nothing_is_asked_of_a_head_that_has_just_gone(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        executor = executor_with_head(listener, monkeypatch)
        clock.now += ray_runtime._RESCALE_SECONDS - 0.5
        executor.wait(0)
    # It answered half a second ago; now that it is time to look for new nodes, it is gone.
    clock.now += 0.5
    assert executor.wait(0) == []


def test_a_head_that_stays_away_ends_the_merge(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        executor = executor_with_head(listener, monkeypatch)
    for _ in range(40):
        clock.now += 1
        executor.wait(0)
    clock.now += 1
    with pytest.raises(StorageError, match=r"(?s)has not answered for 40 s.*run the same command"):
        executor.wait(0)
    executor.close()

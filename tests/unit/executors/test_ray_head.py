"""A head node that is gone is not asked for anything: Ray's answer to that is to end the process."""

from __future__ import annotations

import socket
from typing import cast

import pytest

from mergekit_ray.core.errors import StorageError
from mergekit_ray.executors.driver import Job
from mergekit_ray.executors.ray_cluster import Cluster, is_listening
from mergekit_ray.executors.ray_executor import RESCALE_SECONDS, RayExecutor
from mergekit_ray.worker.resources import WorkerOptions
from support.fake_ray import FakeCluster


class Clock:
    """Seconds that pass when told to."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def executor_on(cluster: FakeCluster, clock: Clock) -> RayExecutor:
    """With one worker, which never comes up."""
    executor = RayExecutor(cast(Cluster, cluster), clock=clock)
    executor.start(Job({}, "out", "records", WorkerOptions(memory_bytes=1)), num_shards=4)
    return executor


def test_nothing_is_asked_of_a_head_that_has_just_gone() -> None:
    cluster, clock = FakeCluster(), Clock()
    executor = executor_on(cluster, clock)
    clock.now += RESCALE_SECONDS - 0.5
    executor.wait(0)
    # It answered half a second ago; now that it is time to look for new nodes, it is gone.
    cluster.is_up = False
    clock.now += 0.5
    assert executor.wait(0) == []


def test_a_head_that_stays_away_ends_the_merge() -> None:
    cluster, clock = FakeCluster(), Clock()
    executor = executor_on(cluster, clock)
    cluster.is_up = False
    for _ in range(40):
        clock.now += 1
        executor.wait(0)
    clock.now += 1
    with pytest.raises(StorageError, match=r"(?s)has not answered for 40 s.*make the same call again"):
        executor.wait(0)
    executor.close()


def test_whether_somebody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = "127.0.0.1:{1}".format(*listener.getsockname())
        assert is_listening(address)
    assert not is_listening(address)
    assert is_listening(""), "of Ray Client this cannot be told"

"""A real Ray that cannot serve a merge says so soon."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import ray

from mergekit_ray.core.errors import MergekitRayError, PlanError, StorageError
from mergekit_ray.executors.driver import Job
from mergekit_ray.executors.ray_cluster import Cluster
from mergekit_ray.executors.ray_executor import RayExecutor
from mergekit_ray.worker.resources import WorkerOptions
from support.servers.ray_head import RayHead
from support.waiting import DEADLINE_SECONDS, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(autouse=True, scope="module")
def whole_classes() -> Iterator[None]:
    """Workers get the classes below as they are: there they could not import what this module does."""
    module = sys.modules[__name__]
    ray.cloudpickle.register_pickle_by_value(module)
    yield
    ray.cloudpickle.unregister_pickle_by_value(module)


class _Unusable:
    def __init__(self) -> None:
        import not_on_this_node  # noqa: F401

    def node(self, *arguments: object) -> str:
        return "here"


class _Crashing(_Unusable):
    def __init__(self) -> None:
        os._exit(3)


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with RayHead() as head:
        yield head


@pytest.fixture
def cluster(head: RayHead) -> Iterator[Cluster]:
    cluster = Cluster(head.address)
    yield cluster
    cluster.close()


def failure(cluster: Cluster, worker: object = None, **options: Any) -> MergekitRayError:
    """What ends a merge of one worker."""
    given = {} if worker is None else {"worker": ray.remote(max_restarts=-1)(worker)}  # type: ignore[call-overload]  # Ray's types lack it
    executor = RayExecutor(cluster, 1, 1, **given)
    executor.start(Job({}, "out", "records", replace(WorkerOptions(memory_bytes=1 << 20), **options)), 1)
    found: list[MergekitRayError] = []

    def fails() -> bool:
        try:
            executor.wait(0.1)
        except MergekitRayError as error:
            found.append(error)
        return bool(found)

    wait_until(fails)
    return found[0]


def test_what_no_node_could_ever_have_is_refused(cluster: Cluster) -> None:
    for error in (failure(cluster, device="cuda"), failure(cluster, memory_bytes=1 << 60)):
        assert isinstance(error, PlanError)
        assert "no node has" in error.what


def test_a_module_that_nodes_lack_is_named(cluster: Cluster) -> None:
    error = failure(cluster, _Unusable)
    assert isinstance(error, StorageError)
    assert "No module named 'not_on_this_node'" in error.what
    assert "install the same version" in (error.remedy or "")


def test_processes_that_die_end_it_and_ray_prints_nothing(cluster: Cluster, capfd: pytest.CaptureFixture[str]) -> None:
    error = failure(cluster, _Crashing)
    assert "while it started" in error.what
    said = capfd.readouterr()
    assert "raylet" not in said.out + said.err


def test_what_nodes_have(cluster: Cluster) -> None:
    (room,) = cluster.rooms()
    assert room.total["CPU"] == 2
    handle = ray.remote(_Idle).options(num_cpus=1).remote()
    ray.get(handle.node.remote(), timeout=DEADLINE_SECONDS)
    wait_until(lambda: cluster.rooms()[0].free.get("CPU") == 1)
    assert cluster.restarts(handle) == 0
    ray.kill(handle)


class _Idle:
    def node(self) -> int:
        return threading.active_count()

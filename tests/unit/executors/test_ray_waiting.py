"""What is said, and when, of a cluster on which no worker comes up."""

from __future__ import annotations

from typing import cast

import pytest
from ray.exceptions import ActorUnavailableError, RayActorError

from mergekit_ray.core.errors import MergekitRayError, PlanError, StorageError
from mergekit_ray.executors.driver import Job
from mergekit_ray.executors.ray_cluster import Cluster
from mergekit_ray.executors.ray_executor import RayExecutor
from mergekit_ray.executors.ray_waiting import NO_WORKER_SECONDS, Room, describe, shortage
from mergekit_ray.worker.resources import WorkerOptions
from support.fake_ray import FakeCluster

SMALL = Room({"CPU": 4.0, "memory": 8e9}, {"CPU": 4.0, "memory": 8e9})
BUSY = Room({"CPU": 4.0, "memory": 8e9}, {"CPU": 4.0, "memory": 1e9})
GPU_ONLY = Room({"CPU": 1.0, "GPU": 1.0, "memory": 8e9}, {})
HEAD = Room({"memory": 8e9}, {})
MISSING = "The actor died because of an error\n  File x\nModuleNotFoundError: No module named 'mergekit_ray'\n"


class Clock:
    """Tells the time it is told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Cast:
    """An executor over a cluster that answers as it is told; its workers ask for 2 CPUs and 2 GB."""

    def __init__(self, *rooms: Room, device: str = "cpu", num_workers: int = 1) -> None:
        self.fake = FakeCluster([4])
        self.fake.described = list(rooms)
        self.clock = Clock()
        self.told: list[str] = []
        self.executor = RayExecutor(cast(Cluster, self.fake), num_workers, 2, clock=self.clock, tell=self.told.append)
        options = WorkerOptions(memory_bytes=2_000_000_000, device=device)
        self.executor.start(Job({}, "out", "records", options), num_shards=8)

    def wait_until(self, seconds: float) -> None:
        """Wait again and again until it is so late."""
        while self.clock.now < seconds:
            self.clock.now += 1
            self.executor.wait(0)


@pytest.mark.parametrize(
    ("request_", "rooms", "expected"),
    [
        ({"CPU": 2}, [], ("there is no node to compute on yet", False)),
        ({"CPU": 2}, [HEAD], ("there is no node to compute on yet", False)),
        ({"CPU": 2, "GPU": 1}, [SMALL], ("no node has a GPU", True)),
        ({"CPU": 8}, [SMALL, HEAD], ("no node has more than 4 CPUs", True)),
        ({"CPU": 2, "memory": 9e9}, [SMALL], ("no node has more than 8.00 GB of memory", True)),
        ({"CPU": 2, "GPU": 1}, [SMALL, GPU_ONLY], ("no node has all of it", True)),
        ({"CPU": 2, "memory": 2e9}, [BUSY], ("no node has more than 1.00 GB of memory free now", False)),
        ({"CPU": 1, "GPU": 1}, [SMALL, GPU_ONLY], ("no node has more than 0 CPUs free now", False)),
        ({"CPU": 2, "GPU": 0}, [BUSY, SMALL], ("there is room for one, and it is starting", False)),
    ],
)
def test_what_is_lacking(request_: dict[str, float], rooms: list[Room], expected: tuple[str, bool]) -> None:
    assert shortage(request_, rooms) == expected


def test_requests_in_words() -> None:
    assert describe({"CPU": 1, "GPU": 0, "memory": 0}) == "1 CPU"
    assert describe({"CPU": 4, "GPU": 1, "memory": 3e9}) == "4 CPUs, a GPU and 3.00 GB of memory"


@pytest.mark.parametrize(("device", "rooms"), [("cuda", [SMALL]), ("cpu", [Room({"CPU": 4.0, "memory": 1e9}, {})])])
def test_what_no_node_could_ever_have_is_refused_at_once(device: str, rooms: list[Room]) -> None:
    cast_ = Cast(*rooms, device=device)
    with pytest.raises(PlanError, match="no node has") as caught:
        cast_.executor.wait(0)
    assert ("`device=" if device == "cuda" else "`memory_bytes=") in (caught.value.remedy or "")
    assert cast_.told == []


def test_an_autoscaler_may_still_bring_it() -> None:
    cast_ = Cast(SMALL, device="cuda")
    cast_.fake.has_autoscaler = True
    cast_.wait_until(10)
    assert cast_.told == ["waiting for workers: each asks for 2 CPUs, a GPU and 2.00 GB of memory; no node has a GPU"]
    with pytest.raises(StorageError, match="no node has a GPU"):
        cast_.wait_until(NO_WORKER_SECONDS + 10)


def test_what_is_lacking_now_is_told_once_each() -> None:
    cast_ = Cast(BUSY)
    cast_.wait_until(4)
    assert cast_.told == []
    cast_.wait_until(60)
    (line,) = cast_.told
    assert line.endswith("each asks for 2 CPUs and 2.00 GB of memory; no node has more than 1.00 GB of memory free now")
    cast_.fake.described = [SMALL]
    cast_.wait_until(70)
    assert [line.rpartition("; ")[2] for line in cast_.told[1:]] == ["there is room for one, and it is starting"]
    cast_.fake.answer("a.node 0", "10.0.0.1")
    cast_.wait_until(NO_WORKER_SECONDS * 2)
    assert len(cast_.told) == 2


def test_it_is_patient_with_nodes_that_were_lost() -> None:
    """Later, no refusal: the node that held a worker may come back."""
    cast_ = Cast(SMALL)
    cast_.fake.answer("a.node 0", "10.0.0.1")
    cast_.wait_until(1)
    cast_.executor._actors[0].node = None
    cast_.fake.described = [Room({"CPU": 1.0}, {})]
    cast_.wait_until(20)
    assert "no node has more than 1 CPU" in cast_.told[-1]


def test_three_deaths_end_it_with_rays_reason() -> None:
    cast_ = Cast(SMALL)
    died = RayActorError(error_msg=MISSING)
    for i in range(2):
        cast_.fake.answer(f"a.node {i}", died)
        cast_.executor.wait(0)
    cast_.fake.answer("a.node 2", died)
    with pytest.raises(StorageError, match="No module named 'mergekit_ray'") as caught:
        cast_.executor.wait(0)
    assert "--runtime-env" in (caught.value.remedy or "")
    assert not caught.value.retryable


def test_a_worker_that_ray_takes_for_unreachable_is_waited_for() -> None:
    """A lost node: calls fail at once, until Ray sees that it has gone and starts the actor elsewhere."""
    cast_ = Cast(SMALL)
    for i in range(20):
        cast_.fake.answer(f"a.node {i}", ActorUnavailableError("connection refused", None))
        cast_.executor.wait(0)
    assert cast_.told == []
    cast_.fake.answer("a.node 20", "10.0.0.2")
    cast_.executor.wait(0)
    assert cast_.executor.num_workers == 1


def test_others_that_start_are_waited_for() -> None:
    cast_ = Cast(SMALL, SMALL, num_workers=2)
    died = RayActorError(error_msg="no disk")
    for i in range(3):
        cast_.fake.answer(f"a.node {i}", died)
        cast_.executor.wait(0)
    cast_.fake.answer("b.node 0", "10.0.0.2")
    cast_.executor.wait(0)
    assert cast_.executor.num_workers == 1
    assert ["worker-0 cannot start" in line for line in cast_.told] == [True]


def test_processes_that_die_at_once_end_it() -> None:
    """Ray starts them again and again, and does not say so in answer to a call."""
    cast_ = Cast(SMALL)
    cast_.wait_until(4)
    cast_.fake.num_restarts = 7
    with pytest.raises(MergekitRayError, match="died 7 times"):
        cast_.wait_until(10)

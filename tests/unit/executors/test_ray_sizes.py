"""How large and how many Ray workers are made, over nodes that are only told of."""

from __future__ import annotations

from typing import cast

import pytest

from mergekit_ray.core.errors import ConfigError
from mergekit_ray.executors.ray_cluster import MAX_CPUS_PER_WORKER, Cluster
from mergekit_ray.executors.ray_executor import RayExecutor
from mergekit_ray.routing.ray_spread import OnRay
from support.fake_ray import FakeCluster


@pytest.mark.parametrize(
    ("nodes", "num_workers", "expected"),
    [
        ([16], None, MAX_CPUS_PER_WORKER),
        ([2, 16], None, 2),  # every node can hold one
        ([4], 1, 4),
        ([4], 2, 2),  # or the second would never start
        ([4, 4], 2, 4),
        ([8, 8], 5, 3),
        ([2], 8, 1),
        ([], None, 1),  # nodes are still to come
    ],
)
def test_as_many_workers_as_asked_for_find_room(nodes: list[int], num_workers: int | None, expected: int) -> None:
    assert RayExecutor(cast(Cluster, FakeCluster(nodes)), num_workers).cpus_per_worker == expected


def test_what_is_asked_for_holds() -> None:
    assert RayExecutor(cast(Cluster, FakeCluster([4])), num_workers=2, cpus_per_worker=1).cpus_per_worker == 1


@pytest.mark.parametrize(
    ("nodes", "device", "num_workers", "expected"),
    [
        ([(16, 0), (16, 0)], "auto", None, OnRay("cpu", 8, 4)),
        ([(16, 0), (2, 0)], "cpu", None, OnRay("cpu", 9, 2)),
        ([(16, 0), (16, 0)], "auto", 3, OnRay("cpu", 3, 4)),
        ([(16, 1), (16, 0)], "auto", None, OnRay("cuda", 1, 4)),
        ([(16, 8), (16, 8)], "cuda", None, OnRay("cuda", 8, 4)),  # four on each node have CPUs too
        ([(16, 8)], "cpu", None, OnRay("cpu", 4, 4)),
        ([(16, 0)], "cuda", None, OnRay("cuda", 1, 4)),  # a GPU may be to come
        ([], "auto", None, OnRay("cpu", 1, 4)),
    ],
)
def test_prompts_are_split_over_what_there_is_room_for(
    nodes: list[tuple[int, int]],
    device: str,
    num_workers: int | None,
    expected: OnRay,
) -> None:
    described = [{"CPU": float(cpus), "GPU": float(gpus)} for cpus, gpus in nodes]
    assert OnRay.over(described, device, num_workers) == expected


def test_prompts_on_one_gpu_of_all() -> None:
    with pytest.raises(ConfigError, match="device 'cuda:1'"):
        OnRay.over([], "cuda:1", None)

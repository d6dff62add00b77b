"""How large a Ray worker is made, over nodes that are only told of."""

from __future__ import annotations

import pytest
import ray

from mergekit_ray.runtime import ray as ray_runtime
from mergekit_ray.runtime.ray import MAX_CPUS_PER_WORKER, RayExecutor


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
def test_as_many_workers_as_asked_for_find_room(
    nodes: list[int], num_workers: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    described = [{"Alive": True, "Resources": {"CPU": float(cpus)}} for cpus in nodes]
    monkeypatch.setattr(ray_runtime, "_compute_nodes", lambda: described)
    executor = RayExecutor(num_workers=num_workers)
    assert executor.cpus_per_worker == expected


def test_what_is_asked_for_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray_runtime, "_compute_nodes", lambda: [{"Alive": True, "Resources": {"CPU": 4.0}}])
    assert RayExecutor(cpus_per_worker=1, num_workers=2).cpus_per_worker == 1

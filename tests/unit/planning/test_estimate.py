"""How long a plan takes to move, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mergekit_ray.core.errors import ConfigError
from mergekit_ray.planning.estimate import Cluster, estimate


def plan_of(*shards: tuple[int, int]) -> Any:
    made = [SimpleNamespace(read_bytes=read, num_bytes=written) for read, written in shards]
    return SimpleNamespace(
        shards=made, read_bytes=sum(read for read, _ in shards), num_bytes=sum(written for _, written in shards)
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nodes=8,link=25Gbit", Cluster(8, 25e9 / 8)),
        ("nodes=1, link=100 Mbit", Cluster(1, 12.5e6)),
        ("link=3GB/s,nodes=2,store=10gbps", Cluster(2, 3e9, 1.25e9)),
        ("nodes=2,link=1.5Tbit", Cluster(2, 187.5e9)),
    ],
)
def test_clusters(text: str, expected: Cluster) -> None:
    assert Cluster.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nodes=8", "link missing"),
        ("", "is unknown"),
        ("node=8,link=1Gbit", "did you mean 'nodes'"),
        ("nodes=0,link=1Gbit", "is not a number of machines"),
        ("nodes=two,link=1Gbit", "is not a number of machines"),
        ("nodes=2,link=fast", "is not a rate"),
        ("nodes=2,link=0Gbit", "is not a rate"),
        ("nodes=2,link=1Gbit,store=5", "is not a rate"),
    ],
)
def test_what_means_nothing(text: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        Cluster.parse(text)
    assert caught.value.remedy


def test_one_node_moves_all_of_it() -> None:
    found = estimate(plan_of((200, 100), (100, 50)), Cluster(1, 10.0))
    assert (found.seconds, found.num_busy, found.balance, found.bound) == (30.0, 1, 1.0, "link, reading")


def test_nodes_share_by_shards() -> None:
    found = estimate(plan_of((300, 100), (200, 100), (100, 100)), Cluster(2, 10.0))
    assert (found.seconds, found.num_busy, found.balance) == (30.0, 2, 1.0)


def test_more_nodes_than_shards() -> None:
    found = estimate(plan_of((100, 100), (100, 100)), Cluster(8, 10.0))
    assert (found.seconds, found.num_busy, found.balance) == (10.0, 2, 0.25)


def test_writing_more_than_is_read() -> None:
    assert estimate(plan_of((50, 400)), Cluster(1, 10.0)).bound == "link, writing"


def test_the_store_may_be_the_limit() -> None:
    found = estimate(plan_of(*[(100, 50)] * 8), Cluster(8, 10.0, store_bytes=20.0))
    assert (found.seconds, found.bound) == (40.0, "store")
    assert estimate(plan_of(*[(100, 50)] * 8), Cluster(8, 10.0, store_bytes=1000.0)).seconds == 10.0

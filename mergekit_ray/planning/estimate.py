"""How long a plan takes to move through a cluster's links. Pure."""

from __future__ import annotations

import heapq
import re
from dataclasses import dataclass
from typing import Final

from mergekit_ray.core.errors import ConfigError
from mergekit_ray.core.plan import Plan
from mergekit_ray.core.spelling import nearest

_RATE: Final = re.compile(r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[kmgt]?(?:bit|bps|b/s))", re.IGNORECASE)
_FACTORS: Final = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_KEYS: Final = ("nodes", "link", "store")
_EXAMPLE: Final = "nodes=8,link=25Gbit"


@dataclass(frozen=True, slots=True)
class Cluster:
    """What a merge would run on.

    Attributes:
        num_nodes: machines with a worker each.
        link_bytes: a second, each way, between a machine and the store.
        store_bytes: a second, each way, that the store gives to all together; None for no limit.
    """

    num_nodes: int
    link_bytes: float
    store_bytes: float | None = None

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """From ``nodes=8,link=25Gbit`` or ``nodes=8,link=25Gbit,store=100Gbit``; ``MB/s`` and similar are bytes.

        Raises:
            ConfigError: it says something else.
        """
        values: dict[str, str] = {}
        for part in text.split(","):
            key, equals, value = (each.strip() for each in part.partition("="))
            if key not in _KEYS or not equals:
                raise ConfigError(
                    f"--cluster: {part.strip()!r} is unknown{nearest(key, _KEYS)}", remedy=f"write {_EXAMPLE}"
                )
            values[key] = value
        missing = [key for key in ("nodes", "link") if key not in values]
        if missing:
            raise ConfigError(f"--cluster: {' and '.join(missing)} missing", remedy=f"write {_EXAMPLE}")
        if not values["nodes"].isdecimal() or int(values["nodes"]) < 1:
            raise ConfigError(f"--cluster: nodes={values['nodes']} is not a number of machines", remedy="1 or more")
        store = _rate("store", values["store"]) if "store" in values else None
        return cls(int(values["nodes"]), _rate("link", values["link"]), store)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What moving the bytes comes to.

    Attributes:
        seconds: until the last shard is written, if nothing but links and store is in the way.
        num_busy: nodes that have work: there may be fewer shards than nodes.
        balance: work of the average node over that of the busiest; less than 1 where shards do not go up evenly.
        bound: what is the limit: ``link, reading``, ``link, writing``, ``store``.
    """

    seconds: float
    num_busy: int
    balance: float
    bound: str


def estimate(plan: Plan, cluster: Cluster) -> Estimate:
    """Hand the shards out as the driver does, largest first, to whoever is free; each reads and writes at once."""
    busy = [0.0] * cluster.num_nodes
    sizes = sorted(plan.shards, key=lambda shard: -(shard.read_bytes + shard.num_bytes))
    for shard in sizes:
        free = heapq.heappop(busy)
        heapq.heappush(busy, free + max(shard.read_bytes, shard.num_bytes) / cluster.link_bytes)
    seconds, bound = max(busy), "link, reading" if plan.read_bytes >= plan.num_bytes else "link, writing"
    num_busy = sum(each > 0 for each in busy)
    balance = sum(busy) / len(busy) / seconds if seconds else 1.0
    if cluster.store_bytes is not None:
        of_store = max(plan.read_bytes, plan.num_bytes) / cluster.store_bytes
        if of_store > seconds:
            seconds, bound = of_store, "store"
    return Estimate(seconds, num_busy, balance, bound)


def _rate(key: str, text: str) -> float:
    match = _RATE.fullmatch(text)
    if match is None or not float(match["number"]):
        raise ConfigError(f"--cluster: {key}={text} is not a rate", remedy="such as 25Gbit (bits) or 3GB/s (bytes)")
    unit = match["unit"]
    lower = unit.lower()
    factor = _FACTORS[lower[0] if lower[0] in "kmgt" else ""]
    bits = lower.endswith(("bit", "bps"))
    return float(match["number"]) * factor / (8 if bits else 1)

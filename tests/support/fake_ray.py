"""A Ray cluster that answers as it is told, in the place of `mergekit_ray.executors.ray_cluster.Cluster`."""

from __future__ import annotations

import string
from collections.abc import Collection, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from mergekit_ray.executors.ray_waiting import Room


class FakeCluster:
    """Its actors are called a, b, c and so on. A call is ``actor.method number``, and ends when `answer` is called.

    Args:
        nodes: CPUs of each node.

    Attributes:
        calls: all that were made.
        killed: actors that were ended.
        is_up: whether the head node answers. Nothing else may be asked of a cluster that does not.
        described: the nodes in full; else each has its CPUs, all of them taken.
        has_autoscaler: whether nodes may be added.
        num_restarts: of each actor.
    """

    head = "head:6379"
    patience_seconds = 40.0

    def __init__(self, nodes: Sequence[int] = (2,)) -> None:
        self._nodes = nodes
        self._names = iter(string.ascii_lowercase)
        self._answers: dict[str, Any] = {}
        self.calls: list[str] = []
        self.killed: list[str] = []
        self.is_up = True
        self.described: list[Room] = []
        self.has_autoscaler = False
        self.num_restarts = 0

    def answer(self, call: str, value: Any) -> None:
        """End a call."""
        assert call in self.calls
        self._answers[call] = value

    def has_head(self) -> bool:
        """See `Cluster.has_head`."""
        return self.is_up

    def nodes(self) -> list[Mapping[str, float]]:
        """See `Cluster.nodes`."""
        self._ask()
        return [{"CPU": float(cpus)} for cpus in self._nodes]

    def rooms(self) -> list[Room]:
        """See `Cluster.rooms`."""
        self._ask()
        return self.described or [Room({"CPU": float(cpus), "memory": 1e9}, {}) for cpus in self._nodes]

    def may_grow(self) -> bool:
        """See `Cluster.may_grow`."""
        self._ask()
        return self.has_autoscaler

    def restarts(self, handle: SimpleNamespace) -> int:
        """See `Cluster.restarts`."""
        self._ask()
        return self.num_restarts

    def start(self, actor: object, **options: Any) -> SimpleNamespace:
        """Something with the methods of `RayWorker`."""
        self._ask()
        name = next(self._names)

        def method(method_name: str) -> SimpleNamespace:
            return SimpleNamespace(remote=lambda *_: self._call(f"{name}.{method_name}"))

        return SimpleNamespace(
            name=name, **{each: method(each) for each in ("run", "has_read", "node", "progress", "stop")}
        )

    def kill(self, handle: SimpleNamespace) -> None:
        """See `Cluster.kill`."""
        self._ask()
        self.killed.append(handle.name)

    def put(self, value: object) -> object:
        """See `Cluster.put`."""
        self._ask()
        return object()

    def get(self, call: str, seconds: float | None = None) -> Any:
        """See `Cluster.get`."""
        value = self._answers[call]
        if isinstance(value, Exception):
            raise value
        return value

    def wait(self, calls: Collection[str], seconds: float) -> set[str]:
        """See `Cluster.wait`; it takes no time."""
        return {call for call in calls if call in self._answers}

    def close(self) -> None:
        """See `Cluster.close`."""

    def _ask(self) -> None:
        assert self.is_up, "asked a head node that is gone"

    def _call(self, name: str) -> str:
        call = f"{name} {sum(each.startswith(f'{name} ') for each in self.calls)}"
        self.calls.append(call)
        return call

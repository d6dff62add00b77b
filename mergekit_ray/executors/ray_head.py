"""The head node of a Ray cluster while a merge depends on it: whether it still answers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol

from mergekit_ray.core.errors import StorageError
from mergekit_ray.reporting.signals import RESUME_CALL

CHECK_SECONDS: Final = 2.0
"""Between two questions."""


class Asked(Protocol):
    """What is asked of a Ray cluster here; see `executors.ray_cluster.Cluster`."""

    head: str
    patience_seconds: float

    def has_head(self) -> bool:
        """Whether the head node answers now; raises StorageError where Ray has ended on this machine."""
        ...


class Head:
    """Asks the head node of a cluster whether it is there.

    Args:
        cluster: that it belongs to.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(self, cluster: Asked, clock: Callable[[], float] = time.monotonic) -> None:
        self._cluster = cluster
        self._clock = clock
        self._seen = self._asked = clock()

    def answers(self, *, at_once: bool = False) -> bool:
        """Whether it answers. A call that needs it does not return while it does not: Ray ends the process.

        Args:
            at_once: ask now, however short ago it answered.

        Raises:
            StorageError: it has not answered for too long, or Ray has ended on this machine.
        """
        now = self._clock()
        if at_once or now - self._asked >= CHECK_SECONDS:
            self._asked = now
            if self._cluster.has_head():
                self._seen = now
        if now - self._seen > self._cluster.patience_seconds:
            raise StorageError(
                f"the Ray cluster's head node has not answered for {self._cluster.patience_seconds:.0f} s",
                where=self._cluster.head,
                remedy=f"bring the cluster up again, and {RESUME_CALL}",
            )
        return self._seen == self._asked

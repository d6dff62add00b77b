"""A real Ray of several nodes on this machine, with its processes within reach."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self
from unittest import mock

import psutil

from support.waiting import wait_until

ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    # A dead node, where nobody listens any more, is noticed within seconds; one that is slow to answer is not dead.
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "60000",
    "RAY_health_check_failure_threshold": "3",
}
"""For every process of a Ray in tests."""

MAX_ATTEMPTS = 5
"""At starting a node."""

_OBJECT_STORE_BYTES = 80 << 20


class RayCluster:
    """A head without CPUs, and nodes to compute on; this process is connected to it as a driver.

    Args:
        num_nodes: to start with, of one CPU each.
    """

    def __init__(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes
        self._environment = contextlib.ExitStack()
        self._folder = ""
        self._cluster: Any = None

    def __enter__(self) -> Self:
        import ray
        from ray.cluster_utils import Cluster

        # It holds sockets, whose paths may have 107 characters.
        self._folder = tempfile.mkdtemp(prefix="ray-")
        # So does the address of the cluster that was started last, in a folder that Ray does not make: other test runs
        # on this machine have their own.
        place = Path(self._folder, "ray")
        place.mkdir()
        environment = {**ENVIRONMENT, "RAY_TMPDIR": self._folder}
        self._environment.enter_context(mock.patch.dict(os.environ, environment))
        head = {"num_cpus": 0, "object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False}
        head["temp_dir"] = str(place)
        self._cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        ray.init(address=self._cluster.address, log_to_driver=False, logging_level="error")
        for _ in range(self._num_nodes):
            self.add_node()
        return self

    def __exit__(self, *exc: object) -> None:
        import ray

        ray.shutdown()
        self._cluster.shutdown()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._environment.close()

    @property
    def nodes(self) -> list[Any]:
        """The nodes that compute."""
        return sorted(self._cluster.worker_nodes, key=lambda node: str(node.unique_id))

    def add_node(self, num_cpus: int = 1) -> Any:
        """A new node."""
        import ray

        sizes = {"num_cpus": num_cpus, "object_store_memory": _OBJECT_STORE_BYTES}
        node = patiently(lambda: self._cluster.add_node(wait=False, **sizes))
        wait_until(lambda: any(each["NodeID"] == node.node_id and each["Alive"] for each in ray.nodes()))
        return node

    def remove_node(self, node: Any) -> None:
        """Kill a node with all that runs on it, as a power cut would."""
        for process in self.workers(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._cluster.remove_node(node, allow_graceful=False)

    def workers(self, node: Any = None) -> list[psutil.Process]:
        """The processes that run our actors, of one node or of all."""
        found = []
        for each in [node] if node is not None else self.nodes:
            [raylet] = each.all_processes["raylet"]
            found += workers_below(raylet.process.pid)
        return found


def patiently(start: Callable[[], Any]) -> Any:
    """Start a node of Ray, and again where Ray gave up: it waits half a minute, too little on a very busy machine."""
    for _ in range(MAX_ATTEMPTS - 1):
        try:
            return start()
        except Exception as error:
            if "timed out during startup" not in str(error):
                raise
    return start()


def workers_below(pid: int, kind: str = "RayWorker") -> list[psutil.Process]:
    """The processes that run our actors, or a task of another name, of those that a process started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(pid).children(recursive=True)
        return [process for process in started if _title(process).startswith(f"ray::{kind}")]
    return []


def freeze(process: psutil.Process) -> None:
    """Stop a process in its tracks: whatever it is doing stays undone, and nobody is told."""
    process.send_signal(signal.SIGSTOP)


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""

"""A connection to a Ray cluster, and what the cluster consists of."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any, Final

import ray

from mergekit_ray.core.errors import StorageError
from mergekit_ray.core.version import __version__
from mergekit_ray.executors.cluster import in_ray_cluster

MAX_CPUS_PER_WORKER: Final = 4
"""CPUs of a worker where nodes have them: more add little to one stream of reads and writes."""

_HOST_AND_PORT: Final = re.compile(r"(?:ray://)?(?P<host>[^/:\s]+):(?P<port>\d+)")
_CONNECT_SECONDS: Final = 10.0


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[None]:
    """Connected to Ray meanwhile, and as before afterwards. See `connect`."""
    if ray.is_initialized():
        yield
        return
    connect(address)
    try:
        yield
    finally:
        disconnect()


def disconnect() -> None:
    """Leave the cluster; end it if `connect` started it."""
    with own_signals():
        ray.shutdown()


def connect(address: str | None) -> None:
    """Connect this process to a cluster.

    Args:
        address: of the cluster; None for ``RAY_ADDRESS``, the cluster of the running job, or else a new local one.

    Raises:
        StorageError: nobody answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _check_listening(address or os.environ.get("RAY_ADDRESS", ""))
    try:
        with own_signals():
            ray.init(
                address=address or ("auto" if in_ray_cluster() else None),
                log_to_driver=False,
                logging_level="error",
                include_dashboard=False if address is None and not in_ray_cluster() else None,
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StorageError(
            f"cannot connect to Ray: {_said(error)}",
            where=address or os.environ.get("RAY_ADDRESS") or "a new local Ray",
            remedy="check the address, or use --executor local",
        ) from error


def check_version(wanted: str, node: str) -> None:
    """Refuse to work for a driver of another version: shards of one model must come from one code.

    Args:
        wanted: the driver's version of mergekit-ray.
        node: this one, for the message.

    Raises:
        StorageError: naming both versions.
    """
    if wanted != __version__:
        raise StorageError(
            f"the driver runs mergekit-ray {wanted}, and this node has {__version__}",
            where=f"node {node}",
            remedy="install the same version on all nodes and where the driver runs, or ship it with the job "
            "(--runtime-env)",
        )


def _said(error: Exception) -> str:
    """What Ray says, in a line; of versions that differ it says both, in several."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines) if "version mismatch" in str(error).lower() else lines[0] if lines else repr(error)


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
    """Keep this process's signal handlers: Ray puts its own in their place at its start, and none at its end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # one that is not Python's
                signal.signal(number, handler)


def _check_listening(address: str) -> None:
    """See that somebody listens at a ``host:port``: Ray itself waits a minute, then ends the process without a word.

    Raises:
        StorageError: nobody does.
    """
    try:
        _reach(address)
    except (OSError, OverflowError) as error:
        raise StorageError(
            f"cannot connect to Ray: {error}",
            where=address,
            remedy="check the address and that the cluster is up, or use --executor local",
        ) from error


def head_address() -> str:
    """``host:port`` of the head node; empty if the connection is by way of Ray Client, which knows none."""
    return "" if ray.util.client.ray.is_connected() else str(ray.get_runtime_context().gcs_address)


def is_listening(address: str) -> bool:
    """Whether somebody listens at a ``host:port``; True for other addresses, of which this cannot be told."""
    try:
        _reach(address)
    except (OSError, OverflowError):
        return False
    return True


def _reach(address: str) -> None:
    found = _HOST_AND_PORT.fullmatch(address)
    if found is not None:
        socket.create_connection((found["host"], int(found["port"])), timeout=_CONNECT_SECONDS).close()


def compute_nodes() -> list[dict[str, Any]]:
    """Live nodes that have CPUs to schedule on."""
    return [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]

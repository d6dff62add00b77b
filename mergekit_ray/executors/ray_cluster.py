"""A connection to a Ray cluster, and what the cluster consists of."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import ray

from mergekit_ray.core.environment import seconds_of
from mergekit_ray.core.errors import ConfigError, StorageError
from mergekit_ray.core.secrets import holds_credential
from mergekit_ray.core.version import __version__
from mergekit_ray.executors.cluster import in_ray_cluster
from mergekit_ray.executors.ray_waiting import Room
from mergekit_ray.reporting.signals import RESUME_CALL

MAX_CPUS_PER_WORKER: Final = 4
"""CPUs of a worker where nodes have them: more add little to one stream of reads and writes."""

_HOST_AND_PORT: Final = re.compile(r"(?:ray://)?(?P<host>[^/:\s]+):(?P<port>\d+)")
_CONNECT_SECONDS: Final = 10.0
_AUTOSCALING_STATUS: Final = "__autoscaling_status"
_UNSCALED_TYPE: Final = re.compile(r"node_[0-9a-f]{40,}")
_PATIENCE_SECONDS: Final = 40.0


def disconnect() -> None:
    """Leave the cluster; end it if `connect` started it."""
    with own_signals():
        ray.shutdown()


def connect(address: str | None) -> None:
    """Connect this process to a cluster.

    Args:
        address: of the cluster; None for ``RAY_ADDRESS``, the cluster of the running job, or else a new local one.

    Raises:
        ConfigError: the address holds a credential.
        StorageError: nobody answers there.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    place = address or os.environ.get("RAY_ADDRESS", "")
    if holds_credential(place):
        raise ConfigError(
            "a Ray cluster's address takes no user or password",
            where=place,
            remedy="write host:port or ray://host:port",
        )
    _check_listening(place)
    try:
        with own_signals():
            ray.init(
                address=address or ("auto" if in_ray_cluster() else None),
                log_to_driver=False,
                logging_level="error",
                include_dashboard=False if address is None and not in_ray_cluster() else None,
            )
        _silence()
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StorageError(
            f"cannot connect to Ray: {_said(error)}",
            where=place or "a new local Ray",
            remedy="check the address, or use `options=MergeOptions(executor='local')`",
        ) from error


def _silence() -> None:
    """Keep Ray from printing what befalls its processes, on standard output: `RayExecutor` reports lost workers.

    ``log_to_driver`` does not concern these lines. They stay in Ray's own logs.
    """
    from ray._private import worker  # noqa: PLC0415 - nothing public does this

    def ignore(*arguments: object, **options: object) -> None:
        del arguments, options

    worker.print_to_stdstream = ignore


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
    """Check that somebody listens at a ``host:port``: Ray itself waits a minute, then ends the process silently.

    Raises:
        StorageError: nobody does.
    """
    try:
        _reach(address)
    except (OSError, OverflowError) as error:
        raise StorageError(
            f"cannot connect to Ray: {error}",
            where=address,
            remedy="check the address and that the cluster is up, or use `options=MergeOptions(executor='local')`",
        ) from error


class Cluster:
    """The Ray cluster that this process is connected to: what `executors.ray_executor` asks of Ray.

    Args:
        address: to connect to unless this process is connected already. See `connect`, also for the errors.

    Attributes:
        head: ``host:port`` of the head node; empty if the connection is by way of Ray Client, which knows none.
        patience_seconds: without an answer of the head node until the merge ends, by ``MERGEKIT_RAY_HEAD_SECONDS``.
            After 60 s (``RAY_gcs_rpc_server_reconnect_timeout_s``) Ray ends this process, whatever it is doing.
    """

    def __init__(self, address: str | None = None) -> None:
        self._is_ours = not ray.is_initialized()
        self._is_local = self._is_ours and address is None and not in_ray_cluster()
        if self._is_ours:
            connect(address)
        self.head = "" if ray.util.client.ray.is_connected() else str(ray.get_runtime_context().gcs_address)
        self._raylet = _raylet() if self.head else ""
        self.patience_seconds = seconds_of("MERGEKIT_RAY_HEAD_SECONDS", _PATIENCE_SECONDS)

    def has_head(self) -> bool:
        """Whether the head node answers now.

        Raises:
            StorageError: Ray has ended on this machine. When an object is next stored or fetched, Ray ends this
                process, too, with exit code 1 and no message: at once if the cluster knows, 10 s later if not.
        """
        try:
            _reach(self._raylet)
        except ConnectionRefusedError as error:
            raise StorageError(
                "Ray has ended on this machine (its raylet no longer answers)",
                where=self._raylet,
                remedy=f"see raylet.out in Ray's logs (/tmp/ray/session_latest/logs), and {RESUME_CALL}",
                retryable=False,
            ) from error
        except OSError:  # it is busy: to be asked again
            pass
        return is_listening(self.head)

    @staticmethod
    def nodes() -> list[Mapping[str, float]]:
        """What each live node that has CPUs to schedule on has, by ``CPU``, ``GPU`` and so on."""
        return [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]

    @staticmethod
    def rooms() -> list[Room]:
        """What each live node has, and has free now; where Ray does not say the latter, as much."""
        from ray._private import state  # noqa: PLC0415 - `ray.available_resources` is the sum over all nodes

        free: Mapping[str, Mapping[str, float]] = {}
        with contextlib.suppress(Exception):  # by way of Ray Client, or with another Ray
            free = state.available_resources_per_node()
        alive = [node for node in ray.nodes() if node["Alive"]]
        return [Room(node["Resources"], free.get(node["NodeID"], node["Resources"])) for node in alive]

    def may_grow(self) -> bool:
        """Whether an autoscaler may add nodes; True while that is not known.

        The monitor of a cluster that has none says so by the nodes' types: it names them after the nodes.
        """
        if self._is_local:
            return False
        try:
            from ray.experimental.internal_kv import _internal_kv_get  # noqa: PLC0415 - nothing public tells

            report = json.loads(_internal_kv_get(_AUTOSCALING_STATUS) or b"{}").get("autoscaler_report") or {}
            types = {*(report.get("active_nodes") or ()), *(report.get("idle_nodes") or ())}
        except Exception:  # noqa: BLE001 - whatever another Ray makes of it
            return True
        return not types or not all(_UNSCALED_TYPE.fullmatch(name) for name in types)

    @staticmethod
    def restarts(handle: Any) -> int:
        """Times that Ray has started an actor's process again; 0 where that is not known."""
        from ray._private import state  # noqa: PLC0415 - the public way needs the dashboard

        with contextlib.suppress(Exception):  # by way of Ray Client, or with another Ray
            return int(state.actors(handle._actor_id.hex())["NumRestarts"])  # noqa: SLF001
        return 0

    @staticmethod
    def start(actor: Any, **options: Any) -> Any:
        """A handle of a new actor; ``options`` are those of `ray.actor.ActorClass.options`."""
        return actor.options(**options).remote()

    @staticmethod
    def kill(handle: Any) -> None:
        """End an actor at once."""
        ray.kill(handle)

    @staticmethod
    def put(value: object) -> Any:
        """A reference to a value, for actors."""
        return ray.put(value)

    @staticmethod
    def get(reference: Any, seconds: float | None = None) -> Any:
        """The result of a call.

        Raises:
            RayError: that of the call, or there is none within ``seconds``.
        """
        return ray.get(reference, timeout=seconds)

    @staticmethod
    def wait(references: Sequence[Any], seconds: float) -> set[Any]:
        """The calls that have ended, waiting at most ``seconds`` for the first; all of them, if there is none."""
        if not references:
            time.sleep(seconds)
            return set()
        finished, others = ray.wait(references, num_returns=1, timeout=seconds)
        if finished and others:
            finished += ray.wait(others, num_returns=len(others), timeout=0)[0]
        return set(finished)

    def close(self) -> None:
        """Leave the cluster, and end it if it was started for this, unless the process was connected before."""
        if self._is_ours:
            disconnect()


def _raylet() -> str:
    """``host:port`` of the process that does Ray's work on this machine; empty if it cannot be reached that way."""
    here = ray.get_runtime_context().get_node_id()
    addresses = [
        f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}" for node in ray.nodes() if node["NodeID"] == here
    ]
    return next(filter(is_listening, addresses), "")


def is_listening(address: str) -> bool:
    """Whether somebody listens at a ``host:port``; True for other addresses, which cannot be checked."""
    try:
        _reach(address)
    except (OSError, OverflowError):
        return False
    return True


def _reach(address: str) -> None:
    """Connect to a ``host:port``; nothing is done about other addresses.

    Raises:
        OSError, OverflowError: nobody listens there.
    """
    found = _HOST_AND_PORT.fullmatch(address)
    if found is not None:
        socket.create_connection((found["host"], int(found["port"])), timeout=_CONNECT_SECONDS).close()

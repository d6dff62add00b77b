"""The actor that runs shards on a node of a Ray cluster."""

from __future__ import annotations

import os
import secrets
import threading
from dataclasses import replace
from typing import Any

import ray

from mergekit_ray.core.errors import InternalError, MergekitRayError
from mergekit_ray.core.plan import Shard
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.evaluation.threads import single_threaded_torch
from mergekit_ray.executors.driver import Job
from mergekit_ray.executors.ray_cluster import check_version
from mergekit_ray.reporting.progress import Progress
from mergekit_ray.storage.fence import open_fenced
from mergekit_ray.storage.opening import open_sources
from mergekit_ray.worker.resources import Resources
from mergekit_ray.worker.worker import SHARDS_IN_WORK, Worker


@ray.remote(
    max_restarts=-1,
    max_task_retries=0,
    max_concurrency=SHARDS_IN_WORK,
    concurrency_groups={"control": 2, "reading": SHARDS_IN_WORK},
)
class RayWorker:
    """A `Worker` with an address, once `node` was called.

    The driver calls ``run`` again once ``has_read`` has returned for the shard before.
    """

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._read = Arrivals()
        self._worker: Worker | None = None
        self._starting = threading.Lock()
        # Of one process, and of no other: the output's fence tells them apart.
        self._address = f"{ray.util.get_node_ip_address()} (process {os.getpid()}, {secrets.token_hex(4)})"
        self._threads = single_threaded_torch()
        self._threads.__enter__()

    def run(self, shard: dict[str, Any]) -> ShardRecord | MergekitRayError:
        """Write one shard. Errors come back as values, so that they arrive as they were raised."""
        assert self._worker is not None
        try:
            return self._worker.run(Shard.from_json(shard), self._stop, lambda: self._read.add(shard["file"]))
        except MergekitRayError as error:
            return error
        except Exception as error:  # noqa: BLE001 - the driver must hear of it, whatever it is
            return InternalError.wrap(error)

    @ray.method(concurrency_group="reading")
    def has_read(self, file: str) -> str:
        """Where this worker runs, once the shard ``file`` that is run has been read and there may be another."""
        self._read.wait_for(file)
        return self._address

    @ray.method(concurrency_group="control")
    def node(self, version: str, jobs: list[Any]) -> str | MergekitRayError:
        """Get ready for a job; where this worker runs, or why it cannot.

        What a constructor is given Ray must keep for restarts, and warns of that; what it raises Ray does not tell.

        Args:
            version: of mergekit-ray, where the driver runs.
            jobs: a reference to a `Job`, in a list, so that another version's is not even looked at.
        """
        with self._starting:
            if self._worker is None:  # the driver may ask twice
                try:
                    self._worker = self._worker_for(version, jobs)
                except MergekitRayError as error:
                    return error
        return self._address

    def _worker_for(self, version: str, jobs: list[Any]) -> Worker:
        check_version(version, self._address)
        job: Job = ray.get(jobs[0])
        resources = Resources(job.inputs, open_sources(job.inputs), job.options)
        fence = None if job.fence is None else replace(job.fence, worker=self._address)
        return Worker(resources, open_fenced(job.output, fence), job.record_folder)

    @ray.method(concurrency_group="control")
    def progress(self) -> Progress:
        """What has been done so far."""
        return Progress() if self._worker is None else self._worker.progress

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Abandon the running shards, leaving nothing behind."""
        self._stop.set()


class Arrivals:
    """Names that one thread adds and another waits for, each as often."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._changed = threading.Condition()

    def add(self, name: str) -> None:
        """Let whoever waits for this name go on."""
        with self._changed:
            self._names.append(name)
            self._changed.notify_all()

    def wait_for(self, name: str) -> None:
        """Wait until the name is there, and take it away."""
        with self._changed:
            self._changed.wait_for(lambda: name in self._names)
            self._names.remove(name)

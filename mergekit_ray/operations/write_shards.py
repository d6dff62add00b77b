"""Shards of a plan are written, by threads of this process or by actors of a Ray cluster."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

from mergekit_ray.core.plan import Plan, Shard
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.evaluation.pool import CHUNK_ELEMENTS
from mergekit_ray.evaluation.threads import single_threaded_torch
from mergekit_ray.executors.cluster import wants_ray
from mergekit_ray.executors.driver import Executor, Job, run_shards
from mergekit_ray.executors.local import LocalExecutor, local_threads, local_workers
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.output.destination import Destination, discard_attempts
from mergekit_ray.output.lease import Lease
from mergekit_ray.planning.windows import thread_bytes
from mergekit_ray.reporting.reporters import Reporter
from mergekit_ray.worker.resources import WorkerOptions


def write_shards(
    shards: Sequence[Shard],
    plan: Plan,
    destination: Destination,
    options: MergeOptions,
    memory_bytes: int,
    tell: Reporter,
    stop: threading.Event,
    lease: Lease,
) -> dict[str, ShardRecord]:
    """Write shards, each with its record. See `executors.driver.run_shards` for the result and the errors.

    Args:
        shards: of the plan.
        plan: whose inputs are read.
        destination: where they go.
        options: on what, and how.
        memory_bytes: budget of each worker.
        tell: told what happens.
        stop: set to stop.
        lease: of the output. Losing it ends the merge.
    """
    executor, num_threads = _executor(options, plan, tell)
    worker_options = WorkerOptions(
        memory_bytes=memory_bytes,
        thread_bytes=thread_bytes(plan),
        num_threads=num_threads,
        chunk_elements=options.chunk_elements or CHUNK_ELEMENTS,
        allow_non_finite=options.allow_non_finite,
        device=options.device,
    )
    job = Job(plan.inputs, destination.sink.uri, destination.record_folder, worker_options, lease.fence)
    with single_threaded_torch():
        return run_shards(shards, job, executor, tell, stop, _Referee(lease, destination))


class _Referee:
    """See `executors.driver.Referee`."""

    def __init__(self, lease: Lease, destination: Destination) -> None:
        self.check = lease.check
        self._lease, self._destination = lease, destination

    def give_up(self, worker: str, files: Sequence[str]) -> None:
        """See `Referee.give_up`. What the worker has prepared goes, as when a lease is taken over."""
        self._lease.give_up(worker)
        discard_attempts(self._destination, files)

    def settle(self, record: ShardRecord) -> ShardRecord:
        """See `Referee.settle`. A store may give the same bytes another version."""
        stat = self._destination.sink.stat(record.file)
        return record if stat is None else replace(record, version=stat.version)


def _executor(options: MergeOptions, plan: Plan, tell: Reporter) -> tuple[Executor, int]:
    """The executor the options ask for, and the compute threads of each of its workers."""
    if wants_ray(options.executor, options.address):
        from mergekit_ray.executors.ray_cluster import Cluster  # noqa: PLC0415 - ray costs a second to import
        from mergekit_ray.executors.ray_executor import RayExecutor  # noqa: PLC0415

        executor = RayExecutor(
            Cluster(options.address), options.num_workers, tell=lambda line: tell.event("waiting", line)
        )
        return executor, executor.cpus_per_worker
    num_workers = options.num_workers or local_workers(plan)
    return LocalExecutor(num_workers), local_threads(num_workers)

"""One merge from plan to published model: lease, destination, executor, driver, check, publish, and swap."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_ray.core.errors import Interrupted, StorageError
from mergekit_ray.core.plan import Plan, Shard
from mergekit_ray.planning.windows import comfortable_memory
from mergekit_ray.runtime.api import MergeOptions, local_threads, local_workers
from mergekit_ray.runtime.cluster import wants_ray
from mergekit_ray.runtime.destination import RECORD_ROOT, Destination, clear, clear_notes, inspect
from mergekit_ray.runtime.driver import Executor, Job, pending_shards, run_shards
from mergekit_ray.runtime.lease import Lease, hold
from mergekit_ray.runtime.local import LocalExecutor, open_sources
from mergekit_ray.runtime.pool import CHUNK_ELEMENTS
from mergekit_ray.runtime.publish import check_records, publish
from mergekit_ray.runtime.reporting import Reporter
from mergekit_ray.runtime.signals import RESUME
from mergekit_ray.runtime.staging import is_swapping, staged, swap
from mergekit_ray.runtime.threads import single_threaded_torch
from mergekit_ray.runtime.worker import WorkerOptions
from mergekit_ray.storage.protocols import PublishingSink, RemainsSink, Sink


def carry_out(
    plan: Plan, destination: Destination, options: MergeOptions, tell: Reporter, stop: threading.Event
) -> None:
    """Write what is missing of the plan and publish it. See `runtime.api.merge` for the errors."""
    sink = destination.sink
    with hold(sink, tell, stop) as lease:
        # Until the lease was ours, another driver may have been at work here.
        found = inspect(sink, plan, overwrite=options.overwrite)
        if found.is_complete:
            _tidy(sink, tell)
        elif found.staging is None:
            clear(sink, found.clear_first)
            _make(_Run(plan, options, tell, stop, lease), found, sink.uri)
        else:
            _replace(_Run(plan, options, tell, stop, lease), found)


@dataclass(frozen=True, slots=True)
class _Run:
    """What all steps of one merge share."""

    plan: Plan
    options: MergeOptions
    tell: Reporter
    stop: threading.Event
    lease: Lease

    def confirm(self) -> None:
        """See that the next step, which readers will see, is still ours to take.

        Raises:
            Interrupted: the user has asked to stop.
            StorageError: another driver has taken over.
        """
        if self.stop.is_set():
            raise Interrupted("the merge was stopped", remedy=RESUME)
        self.lease.confirm()


def _replace(run: _Run, destination: Destination) -> None:
    """Make the model beside the one that is there, then swap the two."""
    sink = destination.sink
    if not is_swapping(destination):
        inner = staged(run.plan, destination)
        if not inner.is_complete:
            _make(run, inner, sink.uri)
    run.confirm()
    _discard_remains(sink, run.plan.shards)
    run.tell.event("replacing", f"replacing what is at {sink.uri}", uri=sink.uri)
    swap(run.plan, destination)
    _tidy(sink, run.tell)


def _make(run: _Run, destination: Destination, uri: str) -> None:
    """Write what is missing of the plan at a destination and publish it there; ``uri`` is what the user calls it."""
    plan, tell, sink = run.plan, run.tell, destination.sink
    if destination.done:
        tell.event(
            "resumed",
            f"{len(destination.done)} of {len(plan.shards)} shards are there already",
            num_done=len(destination.done),
            num_shards=len(plan.shards),
        )
    sink.put(f"{destination.record_folder}/plan.json", json.dumps({"plan_digest": plan.digest}).encode())
    shards = pending_shards(plan, destination.done)
    _discard_remains(sink, shards)
    records = dict(destination.done)
    if shards:
        executor, num_threads = _executor(run.options, plan)
        job = Job(
            inputs=plan.inputs,
            output=sink.uri,
            record_folder=destination.record_folder,
            options=WorkerOptions(
                memory_bytes=run.options.memory_bytes or comfortable_memory(plan),
                num_threads=num_threads,
                chunk_elements=run.options.chunk_elements or CHUNK_ELEMENTS,
                allow_non_finite=run.options.allow_non_finite,
            ),
        )
        with single_threaded_torch():
            records |= run_shards(shards, job, executor, tell, run.stop, run.lease.check)
        # Attempts that failed with their worker, or while the store was away, could not clean up behind themselves.
        _discard_remains(sink, shards)
    tell.event("checking", "checking what was written")
    check_records(plan, destination, records)
    run.confirm()
    tell.event("publishing", f"publishing {uri}", uri=uri)
    clear(sink, destination.clear_last)
    if isinstance(sink, PublishingSink):
        run.lease.rest()  # a renewal after `finish` would begin the next merge
    publish(plan, destination, records, open_sources(plan.inputs))
    _tidy(sink, tell)


def _tidy(sink: Sink, tell: Reporter) -> None:
    """Delete what a complete model was made with. It is no less complete where that is not allowed."""
    try:
        clear_notes(sink)
    except StorageError as error:
        tell.event(
            "warning",
            f"warning: the model is complete, but what it was made with stays in {sink.uri}/{RECORD_ROOT}: {error}",
        )


def _discard_remains(sink: Sink, shards: Sequence[Shard]) -> None:
    """Remove what is left of attempts at these shards; the lease says that nobody writes them now."""
    if isinstance(sink, RemainsSink):
        sink.discard_remains([shard.file for shard in shards])


def _executor(options: MergeOptions, plan: Plan) -> tuple[Executor, int]:
    """The executor the options ask for, and the compute threads of each of its workers."""
    if wants_ray(options.executor, options.address):
        from mergekit_ray.runtime.ray import RayExecutor  # noqa: PLC0415 - ray costs a second to import

        executor = RayExecutor(options.address, options.num_workers)
        return executor, executor.cpus_per_worker
    num_workers = options.num_workers or local_workers(plan)
    return LocalExecutor(num_workers), local_threads(num_workers)

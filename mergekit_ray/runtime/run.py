"""One merge from plan to published model: destination, executor, driver, check, publish."""

from __future__ import annotations

import json
import threading

from mergekit_ray.core.plan import Plan
from mergekit_ray.planning.windows import comfortable_memory
from mergekit_ray.runtime.api import MergeOptions, local_threads
from mergekit_ray.runtime.destination import Destination
from mergekit_ray.runtime.driver import Executor, Job, pending_shards, run_shards
from mergekit_ray.runtime.evaluate import CHUNK_ELEMENTS
from mergekit_ray.runtime.local import LocalExecutor, open_sources
from mergekit_ray.runtime.publish import check_records, publish
from mergekit_ray.runtime.reporting import Reporter
from mergekit_ray.runtime.worker import WorkerOptions, single_threaded_torch


def carry_out(
    plan: Plan, destination: Destination, options: MergeOptions, tell: Reporter, stop: threading.Event
) -> None:
    """Write what is missing of the plan and publish it. See `runtime.api.merge` for the errors."""
    sink = destination.sink
    if destination.done:
        tell.event(
            "resumed",
            f"{len(destination.done)} of {len(plan.shards)} shards are there already",
            num_done=len(destination.done),
            num_shards=len(plan.shards),
        )
    sink.put(f"{destination.record_folder}/plan.json", json.dumps({"plan_digest": plan.digest}).encode())
    shards = pending_shards(plan, destination.done)
    records = dict(destination.done)
    if shards:
        executor, num_threads = _executor(options)
        job = Job(
            inputs=plan.inputs,
            output=sink.uri,
            record_folder=destination.record_folder,
            options=WorkerOptions(
                memory_bytes=options.memory_bytes or comfortable_memory(plan),
                num_threads=num_threads,
                chunk_elements=options.chunk_elements or CHUNK_ELEMENTS,
                allow_non_finite=options.allow_non_finite,
            ),
        )
        with single_threaded_torch():
            records |= run_shards(shards, job, executor, tell, stop)
    tell.event("checking", "checking what was written")
    check_records(plan, destination, records)
    tell.event("publishing", f"publishing {sink.uri}", uri=sink.uri)
    publish(plan, destination, records, open_sources(plan.inputs))


def _executor(options: MergeOptions) -> tuple[Executor, int]:
    """The executor the options ask for, and the compute threads of each of its workers."""
    if _wants_ray(options):
        from mergekit_ray.runtime.ray import RayExecutor  # noqa: PLC0415 - ray costs a second to import

        executor = RayExecutor(options.address, options.num_workers)
        return executor, executor.cpus_per_worker
    num_workers = options.num_workers or 1
    return LocalExecutor(num_workers), local_threads(num_workers)


def _wants_ray(options: MergeOptions) -> bool:
    if options.executor is not None:
        return options.executor == "ray"
    from mergekit_ray.runtime.cluster import in_ray_cluster  # noqa: PLC0415

    return options.address is not None or in_ray_cluster()

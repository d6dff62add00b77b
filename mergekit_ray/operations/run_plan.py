"""A plan is carried out: the one sequence that every operation which writes a model goes through.

    look at the output -> routers, kept or made -> lease -> look again -> shards -> check -> publish -> swap

The first look says whether there is anything to do and whether it may be done, before anybody waits for the routers.
The second, under the lease, is the one that is acted on: another driver may have been at work in between.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

from mergekit_ray.core.errors import Interrupted, StorageError
from mergekit_ray.core.plan import Plan
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.core.shown import table
from mergekit_ray.core.sizes import counted, format_bytes
from mergekit_ray.operations.kept_routers import KeptRouters
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.tensors import Tensors
from mergekit_ray.output.destination import (
    PLAN_FILE,
    RECORD_ROOT,
    ROWS,
    Destination,
    check_twins,
    clear,
    clear_notes,
    discard_attempts,
    inspect,
)
from mergekit_ray.output.lease import Lease, discard_dead, hold
from mergekit_ray.output.publish import check_records, publish
from mergekit_ray.output.staging import is_swapping, staged, swap
from mergekit_ray.planning.figures import figures, summary
from mergekit_ray.planning.transplant.batches import batches_of
from mergekit_ray.planning.windows import check_memory, comfortable_memory
from mergekit_ray.reporting.reporters import Reporter, SilentReporter, duration
from mergekit_ray.reporting.signals import RESUME
from mergekit_ray.storage.fence import open_fenced
from mergekit_ray.storage.opening import open_sink, open_sources
from mergekit_ray.storage.protocols import PublishingSink, Sink

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class MergeResult:
    """What a merge did.

    Attributes:
        uri: where the model is.
        plan: what was carried out.
        num_resumed: shards that an earlier run had finished.
        seconds: from planning to publishing.
        was_there: the model was complete before, and nothing was done.
    """

    uri: str
    plan: Plan
    num_resumed: int
    seconds: float
    was_there: bool = False

    @cached_property
    def _tensors(self) -> Tensors:
        return Tensors.at(self.uri)

    def tensors(self) -> Tensors:
        """The model's tensors by name, from wherever it was written; each is read when it is looked up.

        Raises:
            MergekitRayError: the model is gone, or its store failed.
        """
        return self._tensors

    def load_tensor(self, name: str) -> torch.Tensor:
        """Read one tensor of the model. See `operations.tensors.Tensors.load` for the errors."""
        return self._tensors.load(name)

    def __repr__(self) -> str:
        done = "it was there" if self.was_there else duration(self.seconds)
        return f"<MergeResult {self.uri}: {self.plan.title}, {done}>"

    def _repr_html_(self) -> str:
        rows = {
            "where": self.uri,
            "merge": self.plan.title,
            "parameters": f"{self.plan.num_parameters:,}",
            "size": f"{format_bytes(self.plan.num_bytes)} in {counted(len(self.plan.shards), 'shard')}",
            "shards resumed": self.num_resumed,
            "time": "it was there already" if self.was_there else duration(self.seconds),
        }
        return table("Merged model", rows)


def run_plan(
    plan: Plan,
    output: str,
    options: MergeOptions,
    *,
    reporter: Reporter | None = None,
    stop: threading.Event | AbstractContextManager[threading.Event] | None = None,
    route: Callable[[Reporter, KeptRouters], Plan] | None = None,
) -> MergeResult:
    """Run a plan, unless its result exists already. See `operations.merge.merge` for the errors.

    Args:
        plan: to run.
        output: folder or URI.
        options: how.
        reporter: told what happens.
        stop: set it to stop. A context gives its event, and is entered before anything is written.
        route: makes the same plan with routers, where they are made from prompts: with those that are kept, if any.
    """
    began = time.perf_counter()
    tell = reporter or SilentReporter()
    options.check()
    check_memory(plan, options.memory_bytes or comfortable_memory(plan))
    found = inspect(open_sink(output), plan, overwrite=options.overwrite)
    kept = KeptRouters(plan.digest, tell)
    if route is not None and not found.published:
        kept.look(found)
        plan = route(tell, kept)
    tell.begin(plan)
    for warning in plan.warnings:
        tell.event("warning", warning)
    tell.event("planned", summary(plan), **figures(plan))
    uri = found.sink.uri
    with stop if isinstance(stop, AbstractContextManager) else nullcontext(stop or threading.Event()) as stopped:
        if found.published:
            discard_dead(found.sink)
            tell.event("already_done", f"{uri} already holds the result of this plan", uri=uri)
        else:
            again = None if route is None else partial(route, tell, kept)
            found = _carry_out(plan, found.sink, options, tell, stopped, kept, again)
            tell.event("published", f"{uri} is complete", uri=uri, merge_seconds=round(time.perf_counter() - began, 3))
    return MergeResult(uri, plan, len(found.done), time.perf_counter() - began, found.is_complete)


def _carry_out(
    plan: Plan,
    sink: Sink,
    options: MergeOptions,
    tell: Reporter,
    stop: threading.Event,
    kept: KeptRouters,
    again: Callable[[], Plan] | None,
) -> Destination:
    """Write what is missing of the plan and publish it; what was there. ``again`` makes the plan with ``kept``."""
    with hold(sink, tell, stop) as lease:
        sink = lease.sink
        found = inspect(sink, plan, overwrite=options.overwrite)
        if again is not None and kept.look(found):  # another driver was faster, and its shards may be there
            plan = again()
        merge = _Merge(plan, options, options.memory_bytes or comfortable_memory(plan), tell, stop, lease, kept)
        if found.is_complete:
            _tidy(sink, tell)
        elif found.staging is None:
            clear(sink, found.clear_first)
            _make(merge, found, sink.uri)
        else:
            _replace(merge, found)
    return found


@dataclass(frozen=True, slots=True)
class _Merge:
    """What the steps under the lease share."""

    plan: Plan
    options: MergeOptions
    memory_bytes: int
    tell: Reporter
    stop: threading.Event
    lease: Lease
    kept: KeptRouters

    def confirm(self) -> None:
        """Check that the next step, which readers will see, is still ours to take.

        Raises:
            Interrupted: the user has asked to stop.
            StorageError: another driver has taken over.
        """
        if self.stop.is_set():
            raise Interrupted("stopped", remedy=RESUME)
        self.lease.confirm()


def _replace(merge: _Merge, destination: Destination) -> None:
    """Make the model beside the present one, then swap the two."""
    sink = destination.sink
    if not is_swapping(destination):
        inner = staged(merge.plan, destination, merge.lease.fence)
        if not inner.is_complete:
            _make(merge, inner, sink.uri)
    merge.confirm()
    discard_attempts(destination, [shard.file for shard in merge.plan.shards])
    merge.tell.event("replacing", f"replacing what is at {sink.uri}", uri=sink.uri)
    swap(merge.plan, destination)
    _tidy(sink, merge.tell)


def _make(merge: _Merge, destination: Destination, uri: str) -> None:
    """Write what is missing of the plan at a destination and publish it there; ``uri`` is what the user calls it."""
    plan, tell, sink = merge.plan, merge.tell, destination.sink
    if destination.done:
        tell.event(
            "resumed",
            f"{len(destination.done)} of {counted(len(plan.shards), 'shard')} already there",
            num_done=len(destination.done),
            num_shards=len(plan.shards),
        )
    begun = {"plan_digest": plan.digest, "seed": plan.seed, "recipe": plan.recipe}
    sink.put(f"{destination.record_folder}/{PLAN_FILE}", json.dumps(begun).encode())
    check_twins(destination, plan)
    merge.kept.write(destination)
    records = _write(merge, _with_rows(merge, destination), destination)
    tell.event("checking", "checking what was written")
    check_records(plan, destination, records)
    merge.confirm()
    tell.event("publishing", f"publishing {uri}", uri=uri)
    clear(sink, destination.clear_last)
    if isinstance(sink, PublishingSink):
        merge.lease.rest()  # a renewal after `finish` would begin the next merge
    publish(plan, destination, records, open_sources(plan.inputs))
    _tidy(sink, tell)


def _write(merge: _Merge, plan: Plan, destination: Destination) -> dict[str, ShardRecord]:
    """Write the shards of a plan that are missing; the records of all."""
    shards = [shard for shard in plan.shards if shard.file not in destination.done]
    files = [shard.file for shard in shards]
    discard_attempts(destination, files)
    if not shards:
        return dict(destination.done)
    # numpy, and the rest of the machinery, are only paid for once there is something to write.
    from mergekit_ray.operations.write_shards import write_shards  # noqa: PLC0415

    written = write_shards(
        shards, plan, destination, merge.options, merge.memory_bytes, merge.tell, merge.stop, merge.lease
    )
    # Attempts that failed with their worker, or while the store was away, could not clean up behind themselves.
    discard_attempts(destination, files)
    return {**destination.done, **written}


def _with_rows(merge: _Merge, destination: Destination) -> Plan:
    """The plan, reading rows from beside the output that take long to approximate, once these have been written there.

    Of a repository on the Hub nothing can be read before it is published: there, each tensor is one worker's.
    """
    plan, tell, sink = merge.plan, merge.tell, destination.sink
    batches = None if isinstance(sink, PublishingSink) else batches_of(plan)
    if batches is None or batches.files <= destination.done.keys():
        return plan
    place = open_fenced(f"{sink.uri}/{destination.record_folder}/{ROWS}", merge.lease.fence)
    found = inspect(place, batches.plan, overwrite=True)
    tell.begin(batches.plan)
    done = f"; {counted(len(found.done), 'is', 'are')} done already" if found.done else ""
    tell.event(
        "approximating",
        f"approximating rows of new tokens in {counted(len(batches.plan.shards), 'batch', 'batches')}{done}",
        num_done=len(found.done),
        num_batches=len(batches.plan.shards),
    )
    records = _write(merge, batches.plan, found)
    check_records(batches.plan, found, records)
    reading = batches.read_by(plan, place.uri, records)
    tell.begin(reading)
    return reading


def _tidy(sink: Sink, tell: Reporter) -> None:
    """Delete the notes beside a complete model. If that is not allowed, the model is complete all the same."""
    try:
        clear_notes(sink)
    except StorageError as error:
        tell.event(
            "warning",
            f"the model is complete, but its temporary files stay in {sink.uri}/{RECORD_ROOT}: {error}",
        )

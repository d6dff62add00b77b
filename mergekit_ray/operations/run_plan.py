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
from mergekit_ray.core.machine import total_memory
from mergekit_ray.core.plan import Plan
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.core.shown import table
from mergekit_ray.core.sizes import counted, format_bytes
from mergekit_ray.executors.cluster import wants_ray
from mergekit_ray.operations.kept_routers import KeptRouters
from mergekit_ray.operations.options import MergeOptions
from mergekit_ray.operations.tensors import Tensors
from mergekit_ray.output.destination import (
    PLAN_FILE,
    RECORD_ROOT,
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
from mergekit_ray.planning.beforehand.batches import batches_of
from mergekit_ray.planning.beforehand.part import Beforehand
from mergekit_ray.planning.beforehand.stages import check_fits, least_memory, stages_apart
from mergekit_ray.planning.figures import figures, summary
from mergekit_ray.planning.windows import check_memory, comfortable_memory
from mergekit_ray.reporting.reporters import Reporter, SilentReporter, duration
from mergekit_ray.reporting.signals import RESUME_CALL
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
    sink = open_sink(output)
    budget = _budget(plan, sink, options)
    if isinstance(sink, PublishingSink):
        check_memory(plan, budget)
    else:
        check_fits(plan, budget, sink.uri)
    found = inspect(sink, plan, overwrite=options.overwrite)
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
        merge = _Merge(plan, options, _budget(plan, sink, options), tell, stop, lease, kept)
        if found.is_complete:
            _tidy(sink, tell)
        elif found.staging is None:
            clear(sink, found.clear_first)
            _make(merge, found, sink.uri)
        else:
            _replace(merge, found)
    return found


def _budget(plan: Plan, sink: Sink, options: MergeOptions) -> int:
    """Memory of each worker, in bytes: what was asked for; else what is comfortable.

    If this machine has less, and earlier stages can be computed first, it is what the machine has.
    """
    if options.memory_bytes is not None:
        return options.memory_bytes
    comfortable = comfortable_memory(plan)
    total = total_memory()
    if total is None or wants_ray(options.executor, options.address) or isinstance(sink, PublishingSink):
        return comfortable
    room = total // (options.num_workers or 1)
    return comfortable if comfortable <= room else max(room, least_memory(plan, sink.uri))


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
            raise Interrupted("stopped", remedy=RESUME_CALL)
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
    records = _write(merge, _ready(merge, plan, destination), destination)
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


def _ready(merge: _Merge, plan: Plan, destination: Destination) -> Plan:
    """The plan, reading what is computed first from beside the output, once it has been written there.

    Of a repository on the Hub nothing can be read before it is published: there, each tensor is one worker's.
    """
    if isinstance(destination.sink, PublishingSink):
        return plan
    if (stages := stages_apart(plan, merge.memory_bytes)) is not None:
        what = "computing {} of earlier stages first, as they do not fit into memory with the rest"
        plan = _after(merge, plan, destination, stages, what, ("tensor", "tensors"))
    if (batches := batches_of(plan)) is not None:
        plan = _after(merge, plan, destination, batches, "approximating rows of new tokens in {}", ("batch", "batches"))
    return plan


def _after(
    merge: _Merge, plan: Plan, destination: Destination, part: Beforehand, what: str, unit: tuple[str, str]
) -> Plan:
    """The plan, reading a part of it that is carried out first; itself if its shards that need the part are done."""
    if part.files <= destination.done.keys():
        return plan
    tell, sink = merge.tell, destination.sink
    place = open_fenced(f"{sink.uri}/{destination.record_folder}/{part.key}", merge.lease.fence)
    found = inspect(place, part.plan, overwrite=True)
    tell.begin(part.plan)
    done = f"; {counted(len(found.done), 'is', 'are')} done already" if found.done else ""
    num_parts = len(part.plan.shards)
    tell.event(
        "beforehand",
        what.format(counted(num_parts, *unit)) + done,
        what=part.what,
        num_done=len(found.done),
        num_parts=num_parts,
    )
    records = _write(merge, _ready(merge, part.plan, found), found)
    check_records(part.plan, found, records)
    reading = part.read_by(plan, place.uri, {file: record.version for file, record in records.items()})
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

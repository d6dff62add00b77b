"""The driver hands shards to workers until all are written, then publishes.

It holds a plan and a queue, never a weight. The policy is the same for all executors: largest shard first, a few tries
for faults that may pass, a lost worker's shard goes back to the queue, anything else ends the merge with nothing
published and everything that was finished kept for the next run.
"""

from __future__ import annotations

import contextlib
import heapq
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from mergekit_ray.core.errors import Interrupted, MergekitRayError, StorageError
from mergekit_ray.core.plan import InputModel, Shard
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.core.sizes import format_bytes
from mergekit_ray.reporting.progress import Progress
from mergekit_ray.reporting.reporters import Reporter
from mergekit_ray.reporting.signals import GRACE_SECONDS, RESUME
from mergekit_ray.storage.fence import Fence
from mergekit_ray.worker.resources import WorkerOptions

MAX_ATTEMPTS: Final = 3
"""Times a shard is tried when it fails by an error that may pass."""

MAX_LOSSES: Final = 8
"""Times a shard is put back because its worker was lost. A shard that keeps killing workers ends the merge."""

_WAIT_SECONDS: Final = 0.2

_LACKS_MEMORY: Final = (
    "some tensors need more memory than the device has, and are computed on the CPU "
    "(methods that work on whole tensors)"
)


@dataclass(frozen=True)
class Job:
    """What a worker must know beside its shards: plain data, sent to every worker once.

    Attributes:
        inputs: the plan's input models by key.
        output: path or URI of the output.
        record_folder: folder in the output where records are stored.
        options: of each worker.
        fence: of the output; None for one that nobody else can be writing to.
    """

    inputs: Mapping[str, InputModel]
    output: str
    record_folder: str
    options: WorkerOptions
    fence: Fence | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one attempt at a shard ended: with a record, with an error, or with the loss of its worker.

    Attributes:
        file: the shard.
        record: if it was written.
        error: what went wrong otherwise.
        lost: the worker went away; the shard is not to blame.
        worker: who ran it, for messages.
    """

    file: str
    worker: str
    record: ShardRecord | None = None
    error: MergekitRayError | None = None
    lost: bool = False


class Executor(Protocol):
    """Runs shards on workers. `executors.local` and `executors.ray_executor` implement it."""

    @property
    def num_workers(self) -> int:
        """Workers there are now; may grow and shrink."""
        ...

    def start(self, job: Job, num_shards: int) -> None:
        """Bring workers up. Called once."""
        ...

    def idle(self) -> int:
        """How many more shards may be submitted now: one for each worker that has none, or has read all that it has."""
        ...

    def submit(self, shard: Shard) -> None:
        """Give a shard to an idle worker, one that has none if there is one."""
        ...

    def wait(self, seconds: float) -> Sequence[Outcome]:
        """What has ended, waiting at most ``seconds`` for the first, or until a worker is idle."""
        ...

    def progress(self, *, settled: bool = False) -> Progress:
        """Sum over all workers that are or were there; ``settled`` waits until all have said theirs."""
        ...

    def stop(self) -> None:
        """Ask the workers to abandon what they do, leaving nothing half-written; `wait` then reports each.

        No worker is brought up afterwards.
        """
        ...

    def close(self) -> None:
        """Let the workers go, without waiting for those that did not obey `stop`."""
        ...


@dataclass(order=True, slots=True)
class _Entry:
    priority: int
    order: int
    shard: Shard = field(compare=False)


class ShardQueue:
    """Shards to do, largest first, with a count of what was tried."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._heap = [_Entry(-shard.read_bytes - shard.num_bytes, i, shard) for i, shard in enumerate(shards)]
        heapq.heapify(self._heap)
        self._order = len(shards)
        self._attempts: Counter[str] = Counter()
        self._losses: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._heap)

    def pop(self) -> Shard:
        """The largest shard waiting."""
        return heapq.heappop(self._heap).shard

    def put_back(self, shard: Shard, outcome: Outcome) -> bool:
        """Queue a shard again after a failed attempt. False if it has had its chances."""
        counts, limit = (self._losses, MAX_LOSSES) if outcome.lost else (self._attempts, MAX_ATTEMPTS - 1)
        counts[shard.file] += 1
        if counts[shard.file] > limit:
            return False
        self._order += 1
        heapq.heappush(self._heap, _Entry(-shard.read_bytes - shard.num_bytes, self._order, shard))
        return True


def run_shards(
    shards: Sequence[Shard],
    job: Job,
    executor: Executor,
    reporter: Reporter,
    stop: threading.Event,
    check: Callable[[], None] = lambda: None,
    *,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, ShardRecord]:
    """Have every shard written.

    Args:
        shards: what is still to be done.
        job: what the workers must know beside their shards.
        executor: runs them; it is started and closed here.
        reporter: told of every end of a shard, and of progress.
        stop: set by the user's interrupt.
        check: called all the time; raises what ends the merge for another reason, as the loss of its lease.
        clock: seconds, as `time.monotonic`.

    Returns:
        The record of each shard by file name.

    Raises:
        MergekitRayError: the first error that a retry cannot mend. Other shards in work are abandoned cleanly; finished
            ones stay for the next run.
        Interrupted: ``stop`` was set.
    """
    waiting = ShardQueue(shards)
    running: dict[str, Shard] = {}
    records: dict[str, ShardRecord] = {}
    has_lacked_memory = False
    try:
        executor.start(job, len(shards))
        while waiting or running:
            if stop.is_set():
                raise Interrupted("the merge was stopped", remedy=RESUME)
            check()
            while waiting and executor.idle() > 0:
                shard = waiting.pop()
                running[shard.file] = shard
                executor.submit(shard)
            # All that ended are taken off the list before one of them may end the merge: none is waited for then.
            ended = [(running.pop(outcome.file), outcome) for outcome in executor.wait(_WAIT_SECONDS)]
            for shard, outcome in ended:
                if outcome.record is not None:
                    records[shard.file] = outcome.record
                    reporter.event(
                        "shard_done", f"{shard.file} written", file=shard.file, num_bytes=outcome.record.num_bytes
                    )
                else:
                    _put_back_or_raise(waiting, shard, outcome, reporter)
            so_far = executor.progress()
            if so_far.num_on_cpu and not has_lacked_memory:
                has_lacked_memory = True
                reporter.event("warning", f"warning: {_LACKS_MEMORY}")
            reporter.progress(so_far, len(records), len(shards))
        total = executor.progress(settled=True)
        reporter.progress(total, len(records), len(shards))
        if any("://" in model.uri for model in job.inputs.values()):
            _tell_fetched(shards, total, reporter)
    except BaseException:
        _abandon(executor, running, clock)
        raise
    finally:
        executor.close()
    return records


def _tell_fetched(shards: Sequence[Shard], progress: Progress, reporter: Reporter) -> None:
    """What stores were asked for beside what was needed: gaps and repeated reads are more, mapped files ask nobody."""
    needed = sum(shard.read_bytes for shard in shards)
    if needed:
        text = f"{format_bytes(progress.fetched_bytes)} fetched for {format_bytes(needed)} of inputs"
        text += f" ({progress.fetched_bytes / needed:.2f})"
        reporter.event("fetched", text, fetched_bytes=progress.fetched_bytes, needed_bytes=needed)


def _put_back_or_raise(waiting: ShardQueue, shard: Shard, outcome: Outcome, reporter: Reporter) -> None:
    error = outcome.error or StorageError("the worker was lost", where=shard.file)
    if (outcome.lost or error.retryable) and waiting.put_back(shard, outcome):
        kind = "worker_lost" if outcome.lost else "shard_retried"
        reporter.event(kind, f"{shard.file} is put back: {error.what}", file=shard.file, worker=outcome.worker)
        return
    raise error


def _abandon(executor: Executor, running: dict[str, Shard], clock: Callable[[], float]) -> None:
    """Let running shards clean up behind themselves before the workers go.

    What goes wrong meanwhile, as the loss of all workers, is of no interest any more.
    """
    deadline = clock() + GRACE_SECONDS
    with contextlib.suppress(MergekitRayError):
        executor.stop()
        while running and clock() < deadline:
            for outcome in executor.wait(_WAIT_SECONDS):
                running.pop(outcome.file, None)

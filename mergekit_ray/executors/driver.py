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
from mergekit_ray.executors.watch import Pace, Standing, Watch
from mergekit_ray.reporting.progress import Progress
from mergekit_ray.reporting.reporters import Reporter
from mergekit_ray.reporting.signals import GRACE_SECONDS, RESUME_CALL
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
    """What a worker must know besides its shards: plain data, sent to every worker once.

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
        place: who ran it, as the output's fence knows it.
    """

    file: str
    worker: str
    record: ShardRecord | None = None
    error: MergekitRayError | None = None
    lost: bool = False
    place: str = ""


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

    def standings(self) -> Sequence[Standing]:
        """How the workers that have shards in work are doing, as of the last call of `progress`."""
        ...

    def give_up(self, worker: str) -> None:
        """Have no more to do with a worker. `wait` reports its shards as lost, but for one that was written meanwhile.

        Args:
            worker: as `Standing` names it.
        """
        ...

    def has_spare(self) -> bool:
        """Whether a shard that is given now goes to a worker that has none, on a machine that has room for it."""
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


class Referee(Protocol):
    """Says who may write to the output. `operations.write_shards` has the one that knows its lease."""

    def check(self) -> None:
        """Called all the time.

        Raises:
            MergekitRayError: what ends the merge for another reason, as the loss of the lease.
        """
        ...

    def give_up(self, worker: str, files: Sequence[str]) -> None:
        """Refuse from now on whatever this worker writes.

        Args:
            worker: as `Standing` names it.
            files: shards it has in work, that no other has.

        Raises:
            StorageError: the store failed, or the lease is lost.
        """
        ...

    def settle(self, record: ShardRecord) -> ShardRecord:
        """The record of a shard that two workers may have written, one after the other: the same bytes each time."""
        ...


class _Anyone:
    """Where nobody else can be writing."""

    def check(self) -> None:
        pass

    def give_up(self, worker: str, files: Sequence[str]) -> None:
        pass

    def settle(self, record: ShardRecord) -> ShardRecord:
        return record


ANYONE: Final[Referee] = _Anyone()


def run_shards(
    shards: Sequence[Shard],
    job: Job,
    executor: Executor,
    reporter: Reporter,
    stop: threading.Event,
    referee: Referee = ANYONE,
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
        referee: says who may write.
        clock: seconds, as `time.monotonic`.

    Returns:
        The record of each shard by file name.

    Raises:
        MergekitRayError: the first error that retrying cannot fix. Other shards in work are abandoned cleanly; finished
            ones stay for the next run.
        Interrupted: ``stop`` was set.
    """
    run = _Run(shards, executor, reporter, referee, clock)
    has_lacked_memory = False
    try:
        executor.start(job, len(shards))
        while run.is_unfinished:
            if stop.is_set():
                raise Interrupted("stopped", remedy=RESUME_CALL)
            referee.check()
            run.hand_out()
            run.take(executor.wait(_WAIT_SECONDS))
            so_far = executor.progress()
            run.look_after()
            if so_far.num_on_cpu and not has_lacked_memory:
                has_lacked_memory = True
                reporter.event("warning", _LACKS_MEMORY)
            reporter.progress(so_far, len(run.records), len(shards))
        total = executor.progress(settled=True)
        reporter.progress(total, len(run.records), len(shards))
        if any("://" in model.uri for model in job.inputs.values()):
            _tell_fetched(shards, total, reporter)
    except BaseException:
        _abandon(executor, set(run.running), clock)
        raise
    finally:
        executor.close()
    return run.records


class _Run:
    """Which shards wait, are in work, and are done."""

    def __init__(
        self,
        shards: Sequence[Shard],
        executor: Executor,
        tell: Reporter,
        referee: Referee,
        clock: Callable[[], float],
    ) -> None:
        self.running: dict[str, Shard] = {}
        self.records: dict[str, ShardRecord] = {}
        self._waiting = ShardQueue(shards)
        self._attempts: Counter[str] = Counter()  # that are in work
        self._executor, self._tell, self._referee, self._clock = executor, tell, referee, clock
        self._watch, self._pace = Watch(tell), Pace()

    @property
    def is_unfinished(self) -> bool:
        return bool(self._waiting or self.running)

    def hand_out(self) -> None:
        """Give shards to workers, those that wait first; then what takes another too long."""
        while self._waiting and self._executor.idle() > 0:
            self._submit(self._waiting.pop())
        if self._waiting or not self._executor.has_spare():
            return
        alone = [file for file in self.running if self._attempts[file] == 1]
        file = self._pace.slowest(alone, self._clock())
        if file is not None:
            self._tell.event("backup", f"{file} is slow: another worker starts it as well", file=file)
            self._submit(self.running[file])

    def take(self, outcomes: Sequence[Outcome]) -> None:
        """Note what has ended. All are taken off the list before one may end the merge: none is waited for then."""
        ended = []
        for outcome in outcomes:
            shard = self.running.get(outcome.file)
            if shard is None:  # another has written it
                continue
            self._attempts[outcome.file] -= 1
            is_written = outcome.record is not None
            if is_written or not self._attempts[outcome.file]:
                del self.running[outcome.file]
                self._pace.end(outcome.file, self._clock(), is_written=is_written)
            ended.append((shard, outcome))
        for place in {outcome.place for _, outcome in ended if outcome.lost} - {""}:
            alone = [o.file for _, o in ended if o.place == place and not self._attempts[o.file]]
            self._referee.give_up(place, alone)
        is_settled = set(self.running)
        for shard, outcome in sorted(ended, key=lambda each: each[1].record is None):
            if shard.file in is_settled:
                continue
            is_settled.add(shard.file)
            if outcome.record is not None:
                self._note_written(outcome, outcome.record)
            else:
                _put_back_or_raise(self._waiting, shard, outcome, self._tell)

    def look_after(self) -> None:
        """Give up workers that do nothing any more."""
        for standing in self._watch.look(self._executor.standings()):
            self._tell.event(
                "worker_given_up",
                f"{standing.name} has made no progress for too long: its shards go to other workers",
                worker=standing.name,
            )
            self._executor.give_up(standing.worker)

    def _submit(self, shard: Shard) -> None:
        self.running[shard.file] = shard
        self._attempts[shard.file] += 1
        self._pace.begin(shard, self._clock())
        self._executor.submit(shard)

    def _note_written(self, outcome: Outcome, record: ShardRecord) -> None:
        if self._attempts.pop(outcome.file):
            for other in self._executor.standings():
                if other.worker not in ("", outcome.place) and outcome.file in other.files:
                    self._referee.give_up(other.worker, [outcome.file])
                    self._executor.give_up(other.worker)
            record = self._referee.settle(record)
        self.records[record.file] = record
        self._tell.event("shard_done", f"{record.file} written", file=record.file, num_bytes=record.num_bytes)


def _tell_fetched(shards: Sequence[Shard], progress: Progress, reporter: Reporter) -> None:
    """What stores were asked for beside what was needed: gaps and repeated reads are more, mapped files ask nobody."""
    needed = sum(shard.read_bytes for shard in shards)
    if needed:
        text = f"fetched {format_bytes(progress.fetched_bytes)} to read {format_bytes(needed)} of inputs"
        text += f" (ratio {progress.fetched_bytes / needed:.2f})"
        reporter.event("fetched", text, fetched_bytes=progress.fetched_bytes, needed_bytes=needed)


def _put_back_or_raise(waiting: ShardQueue, shard: Shard, outcome: Outcome, reporter: Reporter) -> None:
    error = outcome.error or StorageError("the worker was lost", where=shard.file)
    if (outcome.lost or error.retryable) and waiting.put_back(shard, outcome):
        kind = "worker_lost" if outcome.lost else "shard_retried"
        reporter.event(
            kind, f"{shard.file} goes back to the queue: {error.what}", file=shard.file, worker=outcome.worker
        )
        return
    raise error


def _abandon(executor: Executor, running: set[str], clock: Callable[[], float]) -> None:
    """Let running shards clean up behind themselves before the workers go.

    What goes wrong meanwhile, as the loss of all workers, is of no interest any more.
    """
    deadline = clock() + GRACE_SECONDS
    with contextlib.suppress(MergekitRayError):
        executor.stop()
        while running and clock() < deadline:
            for outcome in executor.wait(_WAIT_SECONDS):
                running.discard(outcome.file)

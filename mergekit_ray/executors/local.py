"""The local executor: workers are threads of this process, and share its cores."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from mergekit_ray.core.errors import InternalError, MergekitRayError
from mergekit_ray.core.expressions import is_copy
from mergekit_ray.core.machine import available_cpus
from mergekit_ray.core.plan import Plan, Shard
from mergekit_ray.evaluation.device.names import resolve
from mergekit_ray.executors.driver import Job, Outcome
from mergekit_ray.executors.watch import Standing
from mergekit_ray.reporting.progress import Progress
from mergekit_ray.storage.fence import open_fenced
from mergekit_ray.storage.opening import open_sources
from mergekit_ray.storage.protocols import Sink
from mergekit_ray.worker.resources import Resources
from mergekit_ray.worker.worker import SHARDS_IN_WORK, Worker

_MAX_LOCAL_THREADS: Final = 8


@dataclass(slots=True)
class _Seat:
    """A worker as the driver's thread sees it, which alone writes here, and the threads that its shards run on.

    Attributes:
        shards: to be run; None ends a thread.
        is_reading: the last shard that was given has not been read to its end.
        num_running: shards that were given and have not ended.
        files: theirs.
        seen: what it had done when that had last grown, at the time ``moved``.
    """

    name: str
    worker: Worker
    shards: queue.Queue[Shard | None] = field(default_factory=queue.Queue)
    threads: list[threading.Thread] = field(default_factory=list)
    is_reading: bool = False
    num_running: int = 0
    files: list[str] = field(default_factory=list)
    seen: Progress = field(default_factory=Progress)
    moved: float = 0.0

    @property
    def is_idle(self) -> bool:
        return not self.is_reading and self.num_running < SHARDS_IN_WORK


def local_workers(plan: Plan) -> int:
    """Local workers for a plan: one, whose threads compute together; two where most of the output is copied.

    A copy is bound by what each worker does with one thread, hashing and writing.
    """
    num_copied = sum(
        tensor.spec.num_bytes for shard in plan.shards for tensor in shard.tensors if is_copy(tensor.expression)
    )
    return 2 if num_copied > plan.num_bytes / 2 and available_cpus() > 1 else 1


def local_threads(num_workers: int) -> int:
    """Compute threads of each of ``num_workers`` local workers: together no more than there are CPUs."""
    return max(1, min(_MAX_LOCAL_THREADS, available_cpus() // num_workers))


class LocalExecutor:
    """Runs shards on threads of this process.

    Args:
        num_workers: shards being read at the same time.
        worker: makes each worker, as `Worker` does.
        hanging_seconds: for a thread that was stopped and waited for, until it is left alone.
    """

    def __init__(
        self,
        num_workers: int = 1,
        *,
        worker: Callable[[Resources, Sink, str], Worker] = Worker,
        hanging_seconds: float = 1.0,
    ) -> None:
        self._num_workers = num_workers
        self._worker = worker
        self._hanging_seconds = hanging_seconds
        self._events: queue.Queue[tuple[_Seat, Outcome | None]] = queue.Queue()
        self._seats: list[_Seat] = []
        self._stop = threading.Event()

    @property
    def num_workers(self) -> int:
        """Workers that run shards."""
        return self._num_workers

    def start(self, job: Job, num_shards: int) -> None:
        """Open the inputs and the output and start the threads."""
        sources = open_sources(job.inputs)
        sink = open_fenced(job.output, job.fence)
        self._num_workers = min(self._num_workers, max(1, num_shards))
        devices = [resolve(job.options.device, i) for i in range(self._num_workers)]
        for i, device in enumerate(devices):
            sharing = devices.count(device)
            resources = Resources(job.inputs, sources, job.options, number=i, num_sharing=sharing)
            seat = _Seat(f"worker-{i}", self._worker(resources, sink, job.record_folder))
            self._seats.append(seat)
            for k in range(SHARDS_IN_WORK):
                thread = threading.Thread(target=self._serve, args=(seat,), name=f"{seat.name}-{k}", daemon=True)
                seat.threads.append(thread)
                thread.start()

    def idle(self) -> int:
        """Workers that have no shard to read."""
        return sum(seat.is_idle for seat in self._seats)

    def submit(self, shard: Shard) -> None:
        """Give a shard to the worker that has least to do."""
        seat = min((seat for seat in self._seats if seat.is_idle), key=lambda seat: seat.num_running)
        seat.is_reading = True
        seat.num_running += 1
        seat.files.append(shard.file)
        seat.moved = time.monotonic()
        seat.shards.put(shard)

    def wait(self, seconds: float) -> Sequence[Outcome]:
        """Outcomes since the last call; none when a worker has become idle first."""
        outcomes = []
        try:
            event = self._events.get(timeout=seconds)
            while True:
                seat, outcome = event
                if outcome is None:
                    seat.is_reading = False
                else:
                    seat.num_running -= 1
                    seat.files.remove(outcome.file)
                    seat.moved = time.monotonic()
                    outcomes.append(outcome)
                event = self._events.get_nowait()
        except queue.Empty:
            pass
        return outcomes

    def progress(self, *, settled: bool = False) -> Progress:
        """Sum over the workers; always as it is."""
        del settled
        now = time.monotonic()
        for seat in self._seats:
            found = seat.worker.progress
            if found.has_moved(seat.seen):
                seat.seen, seat.moved = found, now
        return Progress.total([seat.worker.progress for seat in self._seats])

    def standings(self) -> Sequence[Standing]:
        """How the workers are doing. A thread cannot be given up, only reported."""
        now = time.monotonic()
        return [Standing("", seat.name, tuple(seat.files), 0.0, now - seat.moved) for seat in self._seats if seat.files]

    def give_up(self, worker: str) -> None:
        """A thread cannot be ended from outside; `standings` names none that could be given up.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"a thread cannot be given up: {worker!r}")

    def has_spare(self) -> bool:
        """Never: all share one machine."""
        return False

    def stop(self) -> None:
        """Ask all threads to abandon their shards."""
        self._stop.set()

    def close(self) -> None:
        """End the threads. After `stop`, those that hang are left alone: the caller has waited for them."""
        for seat in self._seats:
            for _ in seat.threads:
                seat.shards.put(None)
        for seat in self._seats:
            for thread in seat.threads:
                thread.join(self._hanging_seconds if self._stop.is_set() else None)
            if not any(thread.is_alive() for thread in seat.threads):
                seat.worker.close()

    def _serve(self, seat: _Seat) -> None:
        while (shard := seat.shards.get()) is not None:
            self._events.put((seat, self._run(seat, shard)))

    def _run(self, seat: _Seat, shard: Shard) -> Outcome:
        try:
            record = seat.worker.run(shard, self._stop, lambda: self._events.put((seat, None)))
        except MergekitRayError as error:
            return Outcome(shard.file, seat.name, error=error)
        except BaseException as error:  # noqa: BLE001 - the driver must hear of it, whatever it is
            return Outcome(shard.file, seat.name, error=InternalError.wrap(error))
        return Outcome(shard.file, seat.name, record=record)

"""The local executor: workers are threads of this process, and share its cores."""

from __future__ import annotations

import queue
import threading
from collections.abc import Mapping, Sequence
from typing import Final

from mergekit_ray.core.errors import InternalError, MergekitRayError
from mergekit_ray.core.plan import InputModel, Shard
from mergekit_ray.runtime.device import resolve
from mergekit_ray.runtime.driver import Job, Outcome
from mergekit_ray.runtime.progress import Progress
from mergekit_ray.runtime.worker import Worker
from mergekit_ray.storage.opening import open_sink, open_source
from mergekit_ray.storage.protocols import Source

_HANGING_SECONDS: Final = 1.0
"""For a thread that was stopped and waited for, until it is left alone."""


def open_sources(inputs: Mapping[str, InputModel]) -> dict[str, Source]:
    """An open source for each input model of a plan, by its key."""
    return {key: open_source(model.uri) for key, model in inputs.items()}


class LocalExecutor:
    """Runs shards on threads of this process.

    Args:
        num_workers: shards in work at the same time.
    """

    def __init__(self, num_workers: int = 1) -> None:
        self._num_workers = num_workers
        self._shards: queue.Queue[Shard | None] = queue.Queue()
        self._outcomes: queue.Queue[Outcome] = queue.Queue()
        self._workers: list[Worker] = []
        self._threads: list[threading.Thread] = []
        self._stop = threading.Event()
        self._num_running = 0

    @property
    def num_workers(self) -> int:
        """Threads that run shards."""
        return self._num_workers

    def start(self, job: Job, num_shards: int) -> None:
        """Open the inputs and the output and start the threads."""
        sources = open_sources(job.inputs)
        sink = open_sink(job.output)
        self._num_workers = min(self._num_workers, max(1, num_shards))
        devices = [resolve(job.options.device, i) for i in range(self._num_workers)]
        for i, device in enumerate(devices):
            sharing = devices.count(device)
            worker = Worker(job.inputs, sources, sink, job.record_folder, job.options, number=i, num_sharing=sharing)
            thread = threading.Thread(target=self._serve, args=(worker,), name=f"worker-{i}", daemon=True)
            self._workers.append(worker)
            self._threads.append(thread)
            thread.start()

    def idle(self) -> int:
        """Threads without a shard."""
        return self._num_workers - self._num_running

    def submit(self, shard: Shard) -> None:
        """Give a shard to the next free thread."""
        self._num_running += 1
        self._shards.put(shard)

    def wait(self, seconds: float) -> Sequence[Outcome]:
        """Outcomes since the last call."""
        outcomes = []
        try:
            outcomes.append(self._outcomes.get(timeout=seconds))
            while True:
                outcomes.append(self._outcomes.get_nowait())
        except queue.Empty:
            pass
        self._num_running -= len(outcomes)
        return outcomes

    def progress(self, *, settled: bool = False) -> Progress:
        """Sum over the threads; always as it is."""
        del settled
        return Progress.total([worker.progress for worker in self._workers])

    def stop(self) -> None:
        """Ask all threads to abandon their shards."""
        self._stop.set()

    def close(self) -> None:
        """End the threads. After `stop`, those that hang are left alone: whoever stopped has waited for them."""
        for _ in self._threads:
            self._shards.put(None)
        for worker, thread in zip(self._workers, self._threads, strict=True):
            thread.join(_HANGING_SECONDS if self._stop.is_set() else None)
            if not thread.is_alive():
                worker.close()

    def _serve(self, worker: Worker) -> None:
        name = threading.current_thread().name
        while (shard := self._shards.get()) is not None:
            try:
                record = worker.run(shard, self._stop)
            except MergekitRayError as error:
                self._outcomes.put(Outcome(shard.file, name, error=error))
            except BaseException as error:  # noqa: BLE001 - the driver must hear of it, whatever it is
                self._outcomes.put(Outcome(shard.file, name, error=InternalError.wrap(error)))
            else:
                self._outcomes.put(Outcome(shard.file, name, record=record))

"""The Ray executor: a worker is an actor.

Actors are spread over the nodes. A lost actor is restarted by Ray; the shard it had goes back to the driver's queue.
Weights never pass through Ray: actors read from and write to the stores, only plans and records travel.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import ray
from ray.exceptions import RayActorError, RayError

from mergekit_ray.core.errors import InternalError, MergekitRayError, StorageError
from mergekit_ray.core.plan import Shard
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.core.version import __version__
from mergekit_ray.evaluation.device.names import AUTO, CPU, CUDA
from mergekit_ray.evaluation.threads import single_threaded_torch
from mergekit_ray.executors.cluster import check_ray_device, worker_slots
from mergekit_ray.executors.driver import Job, Outcome
from mergekit_ray.executors.ray_cluster import MAX_CPUS_PER_WORKER, Cluster, check_version
from mergekit_ray.executors.ray_metrics import RayMetrics
from mergekit_ray.reporting.progress import Progress
from mergekit_ray.reporting.signals import RESUME
from mergekit_ray.storage.fence import open_fenced
from mergekit_ray.storage.opening import open_sources
from mergekit_ray.worker.resources import Resources
from mergekit_ray.worker.worker import SHARDS_IN_WORK, Worker

RESCALE_SECONDS: Final = 5.0
"""Between looks at what the cluster has room for."""

_NO_WORKER_SECONDS: Final = 300.0
_SETTLE_SECONDS: Final = 5.0
_HEAD_CHECK_SECONDS: Final = 2.0


@ray.remote(
    max_restarts=-1,
    max_task_retries=0,
    max_concurrency=SHARDS_IN_WORK,
    concurrency_groups={"control": 2, "reading": SHARDS_IN_WORK},
)
class RayWorker:
    """A `Worker` with an address. The driver calls ``run`` again once ``has_read`` has returned for the shard before.

    Args:
        version: of mergekit-ray, where the driver runs.
        jobs: a reference to a `Job`, in a list, so that another version's is not even looked at.
    """

    def __init__(self, version: str, jobs: list[Any]) -> None:
        self._stop = threading.Event()
        self._read = Arrivals()
        self._address = str(ray.util.get_node_ip_address())
        self._threads = single_threaded_torch()
        self._threads.__enter__()
        # Ray tells of an actor whose constructor raises that it died, and not of what: `node` says it instead.
        self._failure: MergekitRayError | None = None
        try:
            check_version(version, self._address)
            job: Job = ray.get(jobs[0])
            resources = Resources(job.inputs, open_sources(job.inputs), job.options)
            self._worker = Worker(resources, open_fenced(job.output, job.fence), job.record_folder)
        except MergekitRayError as error:
            self._failure = error

    def run(self, shard: dict[str, Any]) -> ShardRecord | MergekitRayError:
        """Write one shard. Errors come back as values, so that they arrive as they were raised."""
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
    def node(self) -> str | MergekitRayError:
        """Where this worker runs, or why it cannot; answers once that is known."""
        return self._failure or self._address

    @ray.method(concurrency_group="control")
    def progress(self) -> Progress:
        """What has been done so far."""
        return self._worker.progress

    @ray.method(concurrency_group="control")
    def stop(self) -> None:
        """Abandon the running shards, leaving nothing behind."""
        self._stop.set()


@dataclass
class _Actor:
    """An actor as the driver sees it.

    Attributes:
        ready: pending while it starts, or reads the last shard that it was given.
        node: where it runs, None while it starts.
        shards: it has in work, by their pending results.
    """

    name: str
    handle: Any
    ready: Any
    node: str | None = None
    shards: dict[Any, Shard] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    progress_call: Any = None
    base: Progress = field(default_factory=Progress)

    @property
    def is_idle(self) -> bool:
        return self.ready is None and len(self.shards) < SHARDS_IN_WORK


class RayExecutor:
    """Runs shards on actors of a Ray cluster.

    Args:
        cluster: to run on; left at the end.
        num_workers: actors; None for as many as the cluster's CPUs allow, growing when nodes join.
        cpus_per_worker: CPUs each actor reserves and computes on; None for at most `MAX_CPUS_PER_WORKER`, and no more
            than its share where ``num_workers`` is given.
        worker: the class of the actors, as `RayWorker`.
        version: of mergekit-ray, that workers must have.
        clock: seconds, as `time.monotonic`.
    """

    def __init__(
        self,
        cluster: Cluster,
        num_workers: int | None = None,
        cpus_per_worker: int | None = None,
        *,
        worker: Any = RayWorker,
        version: str = __version__,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster = cluster
        self._worker = worker
        self._version = version
        self._clock = clock
        self._num_wanted = num_workers
        self._actors: list[_Actor] = []
        self._job: Job | None = None
        self._jobs: dict[str, Any] = {}
        self._metrics: RayMetrics | None = None
        self._max_actors = self._num_on_gpu = 0
        self._is_stopping = False
        self._rescaled = 0.0
        self._last_ready = self._head_seen = self._head_asked = clock()
        cpus = [int(node.get("CPU", 0)) for node in cluster.nodes()] or [1]
        # As many workers as were asked for must find room, so each may take its share at most.
        share = min(cpus) if num_workers is None else sum(cpus) // num_workers
        self.cpus_per_worker = cpus_per_worker or max(1, min(MAX_CPUS_PER_WORKER, share, *cpus))

    @property
    def num_workers(self) -> int:
        """Actors that are up."""
        return sum(actor.node is not None for actor in self._actors)

    def start(self, job: Job, num_shards: int) -> None:
        """Create the actors.

        Raises:
            ConfigError: a GPU is asked for by its number.
        """
        check_ray_device(job.options.device)
        self._job = job
        self._memory_bytes = job.options.memory_bytes
        self._max_actors = max(1, num_shards)
        self._metrics = RayMetrics(job.output, num_shards, job.options.memory_bytes)
        self._scale()

    def idle(self) -> int:
        """Actors that are up and have no shard to read."""
        return sum(actor.is_idle for actor in self._actors)

    def submit(self, shard: Shard) -> None:
        """Give a shard to the actor that has least to do."""
        actor = min((actor for actor in self._actors if actor.is_idle), key=lambda actor: len(actor.shards))
        actor.shards[actor.handle.run.remote(shard.to_json())] = shard
        actor.ready = actor.handle.has_read.remote(shard.file)

    def wait(self, seconds: float) -> Sequence[Outcome]:
        """What has ended; notices actors that came up or were lost.

        Raises:
            StorageError: no worker has been there for minutes, or the head node has gone.
        """
        self._has_head()
        self._scale()
        refs = [ref for actor in self._actors for ref in (actor.ready, *actor.shards) if ref is not None]
        finished = self._cluster.wait(refs, seconds)
        outcomes = []
        for actor in self._actors:
            for result in [result for result in actor.shards if result in finished]:
                outcomes += self._outcomes(actor, result)
            if actor.ready in finished:
                self._note_ready(actor)
        for outcome in outcomes:
            if self._metrics is not None:
                self._metrics.ended(outcome)
        if self.num_workers:
            self._last_ready = self._clock()
        elif self._clock() - self._last_ready > _NO_WORKER_SECONDS:
            raise StorageError(
                f"no worker came up within {_NO_WORKER_SECONDS:.0f} s: {self.cpus_per_worker} CPUs"
                f"{', a GPU' if self._num_on_gpu else ''} and {self._memory_bytes} bytes of memory were asked for each",
                where="the Ray cluster",
                remedy="check `ray status`; ask for less with --memory, or add nodes",
            )
        return outcomes

    def progress(self, *, settled: bool = False) -> Progress:
        """Sum over all actors, as of their last answers; ``settled`` waits for new ones of those that have no shard."""
        for actor in self._actors:
            if actor.node is None:
                continue
            if settled and not actor.shards:
                with contextlib.suppress(RayError):
                    actor.progress = self._cluster.get(actor.handle.progress.remote(), _SETTLE_SECONDS)
                continue
            if actor.progress_call is None:
                actor.progress_call = actor.handle.progress.remote()
            elif self._cluster.wait([actor.progress_call], 0):
                try:
                    actor.progress = self._cluster.get(actor.progress_call)
                except RayError:
                    actor.base = Progress.total([actor.base, actor.progress.ended()])
                    actor.progress = Progress()
                actor.progress_call = None
        total = Progress.total([part for actor in self._actors for part in (actor.base, actor.progress)])
        if self._metrics is not None:
            self._metrics.update(total, self.num_workers, sum(bool(actor.shards) for actor in self._actors))
        return total

    def stop(self) -> None:
        """Ask all actors to abandon their shards."""
        self._is_stopping = True
        for actor in self._actors:
            if actor.node is not None:
                actor.handle.stop.remote()

    def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        with contextlib.suppress(StorageError):
            if self._has_head(at_once=True):  # there is somebody to tell
                for actor in self._actors:
                    self._cluster.kill(actor.handle)
        self._actors.clear()
        self._cluster.close()

    def _has_head(self, *, at_once: bool = False) -> bool:
        """Whether the head node answers. A call that needs it does not return while it does not: Ray ends the process.

        Args:
            at_once: ask now, however short ago it answered.

        Raises:
            StorageError: it has not answered for too long.
        """
        now = self._clock()
        if at_once or now - self._head_asked >= _HEAD_CHECK_SECONDS:
            self._head_asked = now
            if self._cluster.has_head():
                self._head_seen = now
        if now - self._head_seen > self._cluster.patience_seconds:
            raise StorageError(
                f"the Ray cluster's head node has not answered for {self._cluster.patience_seconds:.0f} s",
                where=self._cluster.head,
                remedy=f"bring the cluster up again, and {RESUME}",
            )
        return self._head_seen == self._head_asked

    def _scale(self) -> None:
        """Create the actors that are missing: all that were asked for, or as many as the nodes have room for now."""
        now = self._clock()
        if self._is_stopping or (self._actors and now - self._rescaled < RESCALE_SECONDS):
            return
        if not self._has_head(at_once=True):
            return
        self._rescaled = now
        wanted = self._num_wanted
        job = self._job
        assert job is not None  # held by the driver: started first
        room, gpus = worker_slots(self._cluster.nodes(), self.cpus_per_worker)
        if wanted is None:
            wanted = max(1, gpus if job.options.device == CUDA else room)
        for i in range(len(self._actors), min(wanted, self._max_actors)):
            on_gpu = job.options.device == CUDA or (job.options.device == AUTO and self._num_on_gpu < gpus)
            self._num_on_gpu += on_gpu
            its_job = self._job_on(job.options.device if on_gpu else CPU)
            handle = self._cluster.start(
                self._worker,
                self._version,
                [its_job],
                num_cpus=self.cpus_per_worker,
                num_gpus=int(on_gpu),
                memory=self._memory_bytes,
                scheduling_strategy="SPREAD",
            )
            self._actors.append(_Actor(f"worker-{i}", handle, handle.node.remote()))

    def _job_on(self, device: str) -> Any:
        """A reference to the job as a worker with this device has it."""
        if device not in self._jobs:
            job = self._job
            assert job is not None
            self._jobs[device] = self._cluster.put(replace(job, options=replace(job.options, device=device)))
        return self._jobs[device]

    def _note_ready(self, actor: _Actor) -> None:
        try:
            found = self._cluster.get(actor.ready)
        except RayActorError:
            # Died: Ray restarts it. What it had in work says so for itself.
            actor.ready = actor.handle.node.remote()
            self._cluster.wait((), 0.1)
            return
        if isinstance(found, MergekitRayError):
            raise found
        actor.node, actor.ready = found, None

    def _outcomes(self, actor: _Actor, result: Any) -> list[Outcome]:
        """How the shard with this result has ended, and with a lost actor its others."""
        shard = actor.shards.pop(result, None)
        if shard is None:  # told of with another
            return []
        name = f"{actor.name} on {actor.node}"
        try:
            value = self._cluster.get(result)
        except RayError as error:
            reason = str(error).strip().splitlines()[0]
            lost = [shard]
            if isinstance(error, RayActorError):
                lost += actor.shards.values()
                actor.shards.clear()
                actor.base = Progress.total([actor.base, actor.progress.ended()])
                actor.progress, actor.progress_call = Progress(), None
                actor.ready, actor.node = actor.handle.node.remote(), None
            return [Outcome(shard.file, name, error=_loss(name, reason, shard), lost=True) for shard in lost]
        if isinstance(value, ShardRecord):
            return [Outcome(shard.file, name, record=value)]
        return [Outcome(shard.file, name, error=value)]


def _loss(name: str, reason: str, shard: Shard) -> StorageError:
    return StorageError(f"{name} was lost: {reason}", where=shard.file, remedy="see `ray status` and the logs")


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

"""The Ray executor: a worker is an actor.

Actors are spread over the nodes. A lost actor is restarted by Ray; the shard it had goes back to the driver's queue.
Weights never pass through Ray: actors read from and write to the stores, only plans and records travel.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from ray.exceptions import ActorUnavailableError, RayActorError, RayError

from mergekit_ray.core.errors import MergekitRayError, StorageError
from mergekit_ray.core.plan import Shard
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.core.version import __version__
from mergekit_ray.evaluation.device.names import AUTO, CPU, CUDA
from mergekit_ray.executors.cluster import check_ray_device, worker_slots
from mergekit_ray.executors.driver import Job, Outcome
from mergekit_ray.executors.ray_cluster import MAX_CPUS_PER_WORKER, Cluster
from mergekit_ray.executors.ray_head import Head
from mergekit_ray.executors.ray_metrics import RayMetrics
from mergekit_ray.executors.ray_waiting import CPU as CPUS
from mergekit_ray.executors.ray_waiting import GPU, MEMORY, Waiting
from mergekit_ray.executors.ray_worker import RayWorker
from mergekit_ray.executors.watch import Standing
from mergekit_ray.reporting.progress import Progress
from mergekit_ray.worker.worker import SHARDS_IN_WORK

RESCALE_SECONDS: Final = 5.0
"""Between looks at what the cluster has room for."""

_SETTLE_SECONDS: Final = 5.0


@dataclass
class _Actor:
    """An actor as the driver sees it.

    Attributes:
        job: a reference to what it works for.
        ready: pending while it starts, or reads the last shard that it was given.
        node: where it runs, None while it starts.
        shards: it has in work, by their pending results.
        asked: when it was last asked for its progress.
        moved: when that had last grown, or it was last given something.
    """

    name: str
    handle: Any
    job: Any
    ready: Any = None
    node: str | None = None
    shards: dict[Any, Shard] = field(default_factory=dict)
    progress: Progress = field(default_factory=Progress)
    progress_call: Any = None
    base: Progress = field(default_factory=Progress)
    asked: float = 0.0
    moved: float = 0.0

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
        tell: called with a line about workers that do not start.
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
        tell: Callable[[str], None] = lambda _: None,
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
        self._num_started = 0
        self._given_up: list[Outcome] = []
        self._departed = Progress()
        self._head = Head(cluster, clock)
        self._waiting = Waiting(cluster, clock, tell)
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
        actor.moved = self._clock()

    def wait(self, seconds: float) -> Sequence[Outcome]:
        """What has ended; notices actors that came up or were lost.

        Raises:
            PlanError: no node could ever hold a worker.
            StorageError: no worker has been there for minutes, they die while they start, or the head node has gone.
        """
        self._head.answers()
        self._scale()
        refs = [ref for actor in self._actors for ref in (actor.ready, *actor.shards) if ref is not None]
        finished = self._cluster.wait(refs, seconds)
        outcomes, self._given_up = self._given_up, []
        for actor in self._actors:
            for result in [result for result in actor.shards if result in finished]:
                outcomes += self._outcomes(actor, result)
            if actor.ready in finished:
                self._note_ready(actor)
        for outcome in outcomes:
            if self._metrics is not None:
                self._metrics.ended(outcome)
        if not self._is_stopping and self._waiting.is_due(self.num_workers) and self._head.answers(at_once=True):
            self._waiting.look([actor.handle for actor in self._actors], self._request)
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
                actor.asked = self._clock()
            elif self._cluster.wait([actor.progress_call], 0):
                try:
                    before, actor.progress = actor.progress, self._cluster.get(actor.progress_call)
                    if actor.progress.has_moved(before):
                        actor.moved = self._clock()
                except RayError:
                    actor.base = Progress.total([actor.base, actor.progress.ended()])
                    actor.progress = Progress()
                actor.progress_call = None
        parts = [part for actor in self._actors for part in (actor.base, actor.progress)]
        total = Progress.total([self._departed, *parts])
        if self._metrics is not None:
            self._metrics.update(total, self.num_workers, sum(bool(actor.shards) for actor in self._actors))
        return total

    def standings(self) -> Sequence[Standing]:
        """How the actors do that have shards."""
        now = self._clock()
        return [
            Standing(
                actor.node,
                f"{actor.name} on {actor.node}",
                tuple(shard.file for shard in actor.shards.values()),
                0.0 if actor.progress_call is None else now - actor.asked,
                now - actor.moved,
            )
            for actor in self._actors
            if actor.node is not None and actor.shards
        ]

    def give_up(self, worker: str) -> None:
        """End an actor, whether or not it notices, and have another in its place if there is room."""
        [actor] = [actor for actor in self._actors if actor.node == worker]
        name = f"{actor.name} on {worker}"
        self._cluster.kill(actor.handle)
        self._actors.remove(actor)
        self._departed = Progress.total([self._departed, actor.base, actor.progress.ended()])
        for shard in actor.shards.values():
            error = _loss(name, "it did nothing any more", shard)
            self._given_up.append(Outcome(shard.file, name, error=error, lost=True, place=worker))

    def has_spare(self) -> bool:
        """Whether an actor has no shard."""
        return any(actor.is_idle and not actor.shards for actor in self._actors)

    def stop(self) -> None:
        """Ask all actors to abandon their shards."""
        self._is_stopping = True
        for actor in self._actors:
            if actor.node is not None:
                actor.handle.stop.remote()

    def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        with contextlib.suppress(StorageError):
            if self._head.answers(at_once=True):  # there is somebody to tell
                for actor in self._actors:
                    self._cluster.kill(actor.handle)
        self._actors.clear()
        self._cluster.close()

    def _scale(self) -> None:
        """Create the actors that are missing: all that were asked for, or as many as the nodes have room for now."""
        now = self._clock()
        if self._is_stopping or (self._actors and now - self._rescaled < RESCALE_SECONDS):
            return
        if not self._head.answers(at_once=True):
            return
        self._rescaled = now
        wanted = self._num_wanted
        job = self._job
        assert job is not None  # held by the driver: started first
        room, gpus = worker_slots(self._cluster.nodes(), self.cpus_per_worker)
        if wanted is None:
            wanted = max(1, gpus if job.options.device == CUDA else room)
        for _ in range(len(self._actors), min(wanted, self._max_actors)):
            on_gpu = job.options.device == CUDA or (job.options.device == AUTO and self._num_on_gpu < gpus)
            self._num_on_gpu += on_gpu
            its_job = self._job_on(job.options.device if on_gpu else CPU)
            handle = self._cluster.start(
                self._worker,
                num_cpus=self.cpus_per_worker,
                num_gpus=int(on_gpu),
                memory=self._memory_bytes,
                scheduling_strategy="SPREAD",
            )
            actor = _Actor(f"worker-{self._num_started}", handle, its_job)
            actor.ready = self._get_ready(actor)
            self._actors.append(actor)
            self._num_started += 1

    def _job_on(self, device: str) -> Any:
        """A reference to the job as a worker with this device has it."""
        if device not in self._jobs:
            job = self._job
            assert job is not None
            self._jobs[device] = self._cluster.put(replace(job, options=replace(job.options, device=device)))
        return self._jobs[device]

    def _get_ready(self, actor: _Actor) -> Any:
        return actor.handle.node.remote(self._version, [actor.job])

    def _note_ready(self, actor: _Actor) -> None:
        try:
            found = self._cluster.get(actor.ready)
        except RayActorError as error:
            # Ray restarts it. Its shards have outcomes of their own.
            if not isinstance(error, ActorUnavailableError):  # nothing answers there, and Ray has not seen yet why
                self._waiting.died(actor.name, error, [each.name for each in self._actors], self.num_workers)
            actor.ready = self._get_ready(actor)
            self._cluster.wait((), 0.1)
            return
        if isinstance(found, MergekitRayError):
            raise found
        if actor.node is None:
            self._waiting.came_up(actor.name)
        actor.node, actor.ready = found, None

    @property
    def _request(self) -> dict[str, float]:
        """What each worker asks for; a GPU if none does without."""
        gpus = int(0 < self._num_on_gpu == len(self._actors))
        return {CPUS: self.cpus_per_worker, GPU: gpus, MEMORY: self._memory_bytes}

    def _outcomes(self, actor: _Actor, result: Any) -> list[Outcome]:
        """How the shard with this result has ended, and with a lost actor its others."""
        shard = actor.shards.pop(result, None)
        if shard is None:  # told of with another
            return []
        name, place = f"{actor.name} on {actor.node}", actor.node or ""
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
                actor.ready, actor.node = self._get_ready(actor), None
            return [
                Outcome(shard.file, name, error=_loss(name, reason, shard), lost=True, place=place) for shard in lost
            ]
        if isinstance(value, ShardRecord):
            return [Outcome(shard.file, name, record=value, place=place)]
        return [Outcome(shard.file, name, error=value, place=place)]


def _loss(name: str, reason: str, shard: Shard) -> StorageError:
    return StorageError(f"{name} was lost: {reason}", where=shard.file, remedy="see `ray status` and the logs")

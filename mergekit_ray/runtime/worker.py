"""A worker: the inputs, the sink, the memory and the threads that shards are run with, one after another.

Where one shard ends the next begins: while the last windows of one are computed, sent and made durable, the next is
already being read, so that neither the cores nor the way from or to a store lie idle between shards.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from mergekit_ray.checkpoint.writer import ShardWriter
from mergekit_ray.core.plan import InputModel, Shard
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.planning.windows import FIXED_BYTES
from mergekit_ray.runtime.budget import Budget
from mergekit_ray.runtime.buffers import BufferPool
from mergekit_ray.runtime.device import CPU, chosen_device, open_device, resolve
from mergekit_ray.runtime.pool import CHUNK_ELEMENTS, ComputePool
from mergekit_ray.runtime.progress import Progress
from mergekit_ray.runtime.shard_run import ShardRun
from mergekit_ray.storage.protocols import Sink, Source

if TYPE_CHECKING:
    from mergekit_ray.runtime.device_evaluate import DeviceSession

SHARDS_IN_WORK: Final = 2
"""Of a worker: one that is being read, and one that has been."""


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How a worker works; none of it changes the bytes written.

    Attributes:
        memory_bytes: budget for inputs, outputs and scratch.
        num_threads: compute threads.
        chunk_elements: elements computed at a time.
        allow_non_finite: let NaN and infinities pass.
        device: what to compute on (`runtime.device.check_device`), by default what `computing_on` says.
    """

    memory_bytes: int
    num_threads: int = 1
    chunk_elements: int = CHUNK_ELEMENTS
    allow_non_finite: bool = False
    device: str = field(default_factory=chosen_device)


class Worker:
    """Runs shards, `SHARDS_IN_WORK` at a time at most.

    Args:
        inputs: the plan's input models, by key.
        sources: an open source per model key.
        sink: where shards go.
        record_folder: folder in the sink where the record of each finished shard is stored.
        options: budget, threads and device.
        number: of the worker among those of its process, which take the devices in turn.
        num_sharing: workers of the process that have the same device.

    Raises:
        ConfigError: a device is asked for that is not there.
    """

    def __init__(
        self,
        inputs: Mapping[str, InputModel],
        sources: Mapping[str, Source],
        sink: Sink,
        record_folder: str,
        options: WorkerOptions,
        number: int = 0,
        num_sharing: int = 1,
    ) -> None:
        self._num_sharing = num_sharing
        self.device = resolve(options.device, number)
        self._session: DeviceSession | None = None
        self.inputs = inputs
        self.sources = sources
        self._sink = sink
        self._record_folder = record_folder
        self.options = options
        self.pool = ComputePool(options.num_threads)
        self.buffers = BufferPool(options.memory_bytes - FIXED_BYTES)
        self.budget = Budget(options.memory_bytes - FIXED_BYTES)
        self._lock = threading.Lock()
        self._ended = Progress()
        self._runs: list[ShardRun] = []

    @property
    def progress(self) -> Progress:
        """What has been done so far, and what is held now."""
        with self._lock:
            total = Progress.total([self._ended, *(run.progress for run in self._runs)])
        total.held_bytes = self.budget.held_bytes
        return total

    def session(self) -> DeviceSession | None:
        """What is done on the device, which is opened now if it was not yet; None on the CPU."""
        if self._session is None and self.device != CPU:
            from mergekit_ray.runtime.device_evaluate import DeviceSession  # noqa: PLC0415 - imports torch

            self._session = DeviceSession(open_device(self.device), self.pool, num_sharing=self._num_sharing)
        return self._session

    def close(self) -> None:
        """End the compute threads."""
        self.pool.close()

    def run(
        self, shard: Shard, stop: threading.Event | None = None, on_read: Callable[[], None] | None = None
    ) -> ShardRecord:
        """Compute and store one shard.

        Once ``on_read`` has been called another thread may run the next shard; until then there must be no other that
        is still being read.

        Args:
            shard: of the plan that the inputs belong to.
            stop: when set, the shard is abandoned as soon as possible and nothing of it is left behind.
            on_read: called once, before this returns or raises: no more of the shard will be read than has been asked
                for. On any thread.

        Returns:
            What was written. The shard is complete and visible under its name, and its record is stored.

        Raises:
            Interrupted: ``stop`` was set.
            CheckpointError, MergeError, StorageError: nothing of the shard is left behind.
        """
        has_been_read = _Once(on_read or _nothing)
        try:
            writer = ShardWriter(self._sink, shard)
            try:
                uses_device = self._compute(ShardRun(self, shard, writer, stop or threading.Event(), has_been_read))
                record = replace(writer.finish(), device=self.device.partition(":")[0] if uses_device else CPU)
            except BaseException:
                writer.abort()
                # What was in use is not given back one by one; the memory goes when the last reference does.
                self._session = None
                self.buffers = BufferPool(self.options.memory_bytes - FIXED_BYTES)
                raise
            # Tensors without elements have no windows, and were written with the header.
            with self._lock:
                self._ended.num_tensors += sum(tensor.spec.num_elements == 0 for tensor in shard.tensors)
            self._sink.put(record_name(self._record_folder, shard), json.dumps(record.to_json()).encode())
            return record
        finally:
            has_been_read()

    def _compute(self, run: ShardRun) -> bool:
        """Whether a device was used. What the run has counted stays counted."""
        with self._lock:
            self._runs.append(run)
        try:
            run.run()
        finally:
            with self._lock:
                self._runs.remove(run)
                self._ended = Progress.total([self._ended, run.progress])
        return run.uses_device


class _Once:
    """Calls a function the first time."""

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._called = False

    def __call__(self) -> None:
        with self._lock:
            called, self._called = self._called, True
        if not called:
            self._function()


def _nothing() -> None:
    pass


def record_name(folder: str, shard: Shard) -> str:
    """Where the record of a shard is stored."""
    return f"{folder}/{shard.file}.json"

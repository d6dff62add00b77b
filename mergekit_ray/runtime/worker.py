"""A worker: the inputs, the sink, the memory and the threads that shards are run with, one after another."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from mergekit_ray.checkpoint.writer import ShardWriter
from mergekit_ray.core.plan import InputModel, Shard
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.planning.windows import FIXED_BYTES
from mergekit_ray.runtime.buffers import BufferPool
from mergekit_ray.runtime.device import CPU, chosen_device, open_device, resolve
from mergekit_ray.runtime.pool import CHUNK_ELEMENTS, ComputePool
from mergekit_ray.runtime.progress import Progress
from mergekit_ray.runtime.shard_run import ShardRun
from mergekit_ray.storage.protocols import Sink, Source

if TYPE_CHECKING:
    from mergekit_ray.runtime.device_evaluate import DeviceSession


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
    """Runs shards one after another.

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
        self._progress = Progress()
        self._run: ShardRun | None = None

    @property
    def progress(self) -> Progress:
        """What has been done so far, and what is held now."""
        self._progress.held_bytes = 0 if self._run is None else self._run.held_bytes
        return self._progress

    def session(self) -> DeviceSession | None:
        """What is done on the device, which is opened now if it was not yet; None on the CPU."""
        if self._session is None and self.device != CPU:
            from mergekit_ray.runtime.device_evaluate import DeviceSession  # noqa: PLC0415 - imports torch

            self._session = DeviceSession(open_device(self.device), self.pool, num_sharing=self._num_sharing)
        return self._session

    def close(self) -> None:
        """End the compute threads."""
        self.pool.close()

    def run(self, shard: Shard, stop: threading.Event | None = None) -> ShardRecord:
        """Compute and store one shard.

        Args:
            shard: of the plan that the inputs belong to.
            stop: when set, the shard is abandoned as soon as possible and nothing of it is left behind.

        Returns:
            What was written. The shard is complete and visible under its name, and its record is stored.

        Raises:
            Interrupted: ``stop`` was set.
            CheckpointError, MergeError, StorageError: nothing of the shard is left behind.
        """
        writer = ShardWriter(self._sink, shard)
        try:
            self._run = run = ShardRun(self, shard, writer, stop or threading.Event())
            run.run()
            record = replace(writer.finish(), device=self.device.partition(":")[0] if run.uses_device else CPU)
        except BaseException:
            writer.abort()
            # What was in use is not given back one by one; the memory goes when the last reference does.
            self._session = None
            self.buffers = BufferPool(self.options.memory_bytes - FIXED_BYTES)
            raise
        finally:
            self._run = None
        # Tensors without elements have no windows, and were written with the header.
        self._progress.num_tensors += sum(tensor.spec.num_elements == 0 for tensor in shard.tensors)
        self._sink.put(record_name(self._record_folder, shard), json.dumps(record.to_json()).encode())
        return record


def record_name(folder: str, shard: Shard) -> str:
    """Where the record of a shard is stored."""
    return f"{folder}/{shard.file}.json"

"""A worker: runs shards one after another with its inputs, memory and threads.

Shards overlap: while the last windows of one are computed, sent and made durable, the worker already reads the next, so
that neither cores nor links idle between shards.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from mergekit_ray.checkpoint.writer import ShardWriter
from mergekit_ray.core.plan import Shard
from mergekit_ray.core.record import ShardRecord, record_file
from mergekit_ray.evaluation.device.names import CPU
from mergekit_ray.reporting.progress import Progress
from mergekit_ray.storage.protocols import Sink
from mergekit_ray.worker.pipeline import ShardPipeline
from mergekit_ray.worker.resources import Resources

SHARDS_IN_WORK: Final = 2
"""Of a worker: one that is being read, and one that has been."""


class Worker:
    """Runs shards, `SHARDS_IN_WORK` at a time at most.

    Args:
        resources: inputs, memory, threads, device. They are the worker's own, and closed with it.
        sink: where shards go.
        record_folder: folder in the sink where the record of each finished shard is stored.
    """

    def __init__(self, resources: Resources, sink: Sink, record_folder: str) -> None:
        self.resources = resources
        self._sink = sink
        self._record_folder = record_folder
        self._lock = threading.Lock()
        self._ended = Progress()
        self._pipelines: list[ShardPipeline] = []

    @property
    def progress(self) -> Progress:
        """What has been done so far, and what is held now."""
        with self._lock:
            total = Progress.total([self._ended, *(pipeline.progress for pipeline in self._pipelines)])
        total.held_bytes = self.resources.budget.held_bytes
        return total

    def close(self) -> None:
        """End the compute threads."""
        self.resources.close()

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
                uses_device = self._compute(
                    ShardPipeline(self.resources, shard, writer, stop or threading.Event(), has_been_read)
                )
                record = replace(
                    writer.finish(), device=self.resources.device.partition(":")[0] if uses_device else CPU
                )
            except BaseException:
                writer.abort()
                self.resources.discard()
                raise
            # Tensors without elements have no windows, and were written with the header.
            with self._lock:
                self._ended.num_tensors += sum(tensor.spec.num_elements == 0 for tensor in shard.tensors)
            self._sink.put(record_file(self._record_folder, shard.file), json.dumps(record.to_json()).encode())
            return record
        finally:
            has_been_read()

    def _compute(self, pipeline: ShardPipeline) -> bool:
        """Whether a device was used. What the pipeline has counted stays counted."""
        with self._lock:
            self._pipelines.append(pipeline)
        try:
            pipeline.run()
        finally:
            with self._lock:
                self._pipelines.remove(pipeline)
                self._ended = Progress.total([self._ended, pipeline.progress])
        return pipeline.uses_device


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

"""What a worker has, and all its shards use: inputs, memory, threads, and a device where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_ray.core.plan import InputModel
from mergekit_ray.evaluation.budget import Budget
from mergekit_ray.evaluation.device.names import CPU, open_device, resolve
from mergekit_ray.evaluation.pool import CHUNK_ELEMENTS, ComputePool
from mergekit_ray.planning.windows import FIXED_BYTES, mapped_models, window_bytes
from mergekit_ray.storage.protocols import MappableSource, Source
from mergekit_ray.worker.buffers import BufferPool
from mergekit_ray.worker.parts import PART_BYTES

if TYPE_CHECKING:
    from mergekit_ray.evaluation.device.evaluate import DeviceSession


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How a worker works. Of this only ``device`` may change the bytes written, by the last bit of some elements.

    Attributes:
        memory_bytes: budget for inputs, outputs and scratch.
        thread_bytes: of these, what `planning.windows.thread_bytes` says.
        num_threads: compute threads.
        chunk_elements: elements computed at a time.
        part_bytes: of a window's result, written at a time for each thread; see `worker.parts.cut`.
        allow_non_finite: let NaN and infinities pass.
        device: what to compute on, see `evaluation.device.names.check_device`.
    """

    memory_bytes: int
    thread_bytes: int = 0
    num_threads: int = 1
    chunk_elements: int = CHUNK_ELEMENTS
    part_bytes: int = PART_BYTES
    allow_non_finite: bool = False
    device: str = CPU


class Resources:
    """What a worker has.

    Args:
        inputs: the plan's input models, by key.
        sources: an open source per model key.
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
        options: WorkerOptions,
        *,
        number: int = 0,
        num_sharing: int = 1,
    ) -> None:
        self.inputs = inputs
        self.sources = sources
        self.options = options
        self.device = resolve(options.device, number)
        self.pool = ComputePool(options.num_threads)
        self.mapped = mapped_models(inputs) & {
            key for key, source in sources.items() if isinstance(source, MappableSource)
        }
        self.limit_bytes = window_bytes(options.memory_bytes - options.thread_bytes)
        self.budget = Budget(self.limit_bytes)
        self.buffers = self._new_buffers()
        self._num_sharing = num_sharing
        self._session: DeviceSession | None = None

    def session(self) -> DeviceSession:
        """The device's session, opened at the first call. Only for workers with a device."""
        if self._session is None:
            from mergekit_ray.evaluation.device.evaluate import DeviceSession  # noqa: PLC0415 - imports torch

            self._session = DeviceSession(open_device(self.device), self.pool, num_sharing=self._num_sharing)
        return self._session

    def discard(self) -> None:
        """Begin anew after a failure: what was in use goes when the last reference does, not one by one."""
        self._session = None
        self.buffers = self._new_buffers()

    def _new_buffers(self) -> BufferPool:
        return BufferPool(self.options.memory_bytes - self.options.thread_bytes - FIXED_BYTES)

    def close(self) -> None:
        """End the compute threads."""
        self.pool.close()

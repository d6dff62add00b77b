"""The bytes that windows are computed from: mapped where they lie, or read into buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mergekit_ray.checkpoint.reader import ByteRange
from mergekit_ray.core.expressions import Load
from mergekit_ray.core.plan import InputModel
from mergekit_ray.evaluation.pieces import Bytes
from mergekit_ray.planning.windows import Window, is_mapped
from mergekit_ray.storage.local.fault_guard import is_guarded
from mergekit_ray.storage.protocols import MappableSource, Source
from mergekit_ray.worker.buffers import BufferPool
from mergekit_ray.worker.held_inputs import HeldInputs


@dataclass(slots=True)
class WindowInputs:
    """The bytes of a window's loads: mapped, in ``buffers`` (which go back to the pool), or held for several windows.

    ``shared`` are buffers whose last use this window is. Earlier windows may still be being written from them, so they
    go back once this one has been.
    """

    data: dict[Load, Bytes] = field(default_factory=dict)
    buffers: list[Bytes] = field(default_factory=list)
    shared: list[Bytes] = field(default_factory=list)


class InputReader:
    """Finds a place for every input of a shard's windows. For one thread: the reader.

    Args:
        models: the plan's input models, by key.
        sources: an open source per model key.
        buffers: where memory comes from.
        batches: all of the shard's, in order.
        limit_bytes: budget for windows and for what is held for several of them.
    """

    def __init__(
        self,
        models: Mapping[str, InputModel],
        sources: Mapping[str, Source],
        buffers: BufferPool,
        batches: Sequence[Sequence[Window]],
        limit_bytes: int,
    ) -> None:
        self._models, self._buffers = models, buffers
        self._mappable = {
            key: source for key, source in sources.items() if isinstance(source, MappableSource) and is_guarded()
        }
        self._checks: list[Callable[[], None]] = []
        self._held = HeldInputs(batches, limit_bytes, sources.keys() - self._mappable.keys())

    @property
    def reserved_bytes(self) -> int:
        """Of the budget, for what is held; the rest is for windows."""
        return self._held.reserved_bytes

    def prepare(self, window: Window, requests: list[ByteRange]) -> WindowInputs:
        """Map what can be mapped, and add requests for the rest."""
        inputs = WindowInputs()
        for load, (first, last) in window.needs.items():
            itemsize = load.spec.dtype.itemsize
            file = load.location.file
            start = load.location.start + first * itemsize
            stop = load.location.start + last * itemsize
            version = self._models[load.model].files[file].version
            mappable = self._mappable.get(load.model)
            if mappable is not None and is_mapped(load, (first, last), self._mappable.keys()):
                mapped = mappable.map_range(file, start, stop, version=version)
                inputs.data[load] = np.frombuffer(mapped.data, dtype=np.uint8)
                self._checks.append(mapped.check)
                continue
            held = self._held.get(load, (first, last))
            if held is not None:
                inputs.data[load] = held[0][: stop - start]
                inputs.shared += [held[0]] if held[1] else []
                continue
            buffer = self._buffers.take(stop - start)
            if not self._held.hold(load, (first, last), buffer):
                inputs.buffers.append(buffer)
            inputs.data[load] = buffer[: stop - start]
            requests.append(ByteRange(load.model, file, start, stop, version, inputs.data[load].data))
        return inputs

    def check_unchanged(self) -> None:
        """Check that no file changed while it was mapped.

        Raises:
            CheckpointError: one did; names it.
            StorageError: a part of one could not be read.
        """
        for check in self._checks:
            check()

"""The bytes that windows are computed from: mapped where they lie, or read into buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mergekit_ray.checkpoint.reader import ByteRange, read_into
from mergekit_ray.core.expressions import Gather, Load, Stored
from mergekit_ray.core.plan import InputModel
from mergekit_ray.evaluation.pieces import Bytes
from mergekit_ray.planning.windows import Window, is_mapped
from mergekit_ray.storage.local.fault_guard import is_guarded
from mergekit_ray.storage.protocols import MappableSource, Source
from mergekit_ray.worker.buffers import BufferPool
from mergekit_ray.worker.gathers import Filling, RowReader
from mergekit_ray.worker.held_inputs import HeldInputs


@dataclass(slots=True)
class Reading:
    """What is to be read for windows.

    Attributes:
        ranges: bytes that go to their place as they are.
        fillings: what else fills buffers.
    """

    ranges: list[ByteRange] = field(default_factory=list)
    fillings: list[Filling] = field(default_factory=list)

    def run(self, sources: Mapping[str, Source]) -> int:
        """Do it; how many bytes were asked of the stores. Raises as `read_into`."""
        return read_into(sources, self.ranges) + sum(fill() for fill in self.fillings)


@dataclass(slots=True)
class WindowInputs:
    """The bytes of a window's inputs: mapped, in ``buffers`` (which go back to the pool), or held for several windows.

    ``shared`` are buffers whose last use this window is. Earlier windows may still be being written from them, so they
    go back once this one has been.
    """

    data: dict[Stored, Bytes] = field(default_factory=dict)
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
        self._rows = RowReader(models, sources, self._mappable)
        self._checks: list[Callable[[], None]] = self._rows.checks
        self._held = HeldInputs(batches, limit_bytes, sources.keys() - self._mappable.keys())

    @property
    def reserved_bytes(self) -> int:
        """Of the budget, for what is held; the rest is for windows."""
        return self._held.reserved_bytes

    def prepare(self, window: Window, reading: Reading) -> WindowInputs:
        """Map what can be mapped, and add the rest to what is to be read."""
        inputs = WindowInputs()
        for leaf, run in window.needs.items():
            if isinstance(leaf, Load) and is_mapped(leaf, run, self._mappable.keys()):
                inputs.data[leaf] = self._mapped(leaf, run)
                continue
            first, last = (element * leaf.spec.dtype.itemsize for element in leaf.held(*run))
            start, stop = (element * leaf.spec.dtype.itemsize - first for element in run)
            held = self._held.get(leaf, run)
            if held is not None:
                inputs.data[leaf] = held[0][start:stop]
                inputs.shared += [held[0]] if held[1] else []
                continue
            buffer = self._buffers.take(last - first)
            if not self._held.hold(leaf, run, buffer):
                inputs.buffers.append(buffer)
            inputs.data[leaf] = buffer[start:stop]
            if isinstance(leaf, Gather):
                reading.fillings += self._rows.prepare(leaf, run, buffer[: last - first], reading.ranges)
            elif isinstance(leaf, Load):
                reading.ranges.append(self._range(leaf, run, inputs.data[leaf]))
        return inputs

    def _mapped(self, load: Load, run: tuple[int, int]) -> Bytes:
        file, (start, stop) = load.location.file, _place(load, run)
        version = self._models[load.model].files[file].version
        mapped = self._mappable[load.model].map_range(file, start, stop, version=version)
        self._checks.append(mapped.check)
        return np.frombuffer(mapped.data, dtype=np.uint8)

    def _range(self, load: Load, run: tuple[int, int], data: Bytes) -> ByteRange:
        file, (start, stop) = load.location.file, _place(load, run)
        version = self._models[load.model].files[file].version
        return ByteRange(load.model, file, start, stop, version, data.data)

    def check_unchanged(self) -> None:
        """Check that no file changed while it was mapped.

        Raises:
            CheckpointError: one did; names it.
            StorageError: a part of one could not be read.
        """
        for check in self._checks:
            check()


def _place(load: Load, run: tuple[int, int]) -> tuple[int, int]:
    """Bytes of the file that a run of elements is."""
    start, itemsize = load.location.start, load.spec.dtype.itemsize
    return start + run[0] * itemsize, start + run[1] * itemsize

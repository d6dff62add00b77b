"""A worker runs shards: read, compute and write overlap under a byte budget.

    reader thread     batches of byte ranges -> input buffers
    calling thread    windows: expression over input buffers -> output buffer (arithmetic on the compute pool)
    writer thread     output buffers -> shard file, hashed on the way

Memory is taken from the budget before a batch is read and given back as its parts are done with, so a worker never
holds more than its budget whatever the size of the model.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final

import torch

from mergekit_ray.checkpoint.reader import ByteRange, read_into
from mergekit_ray.checkpoint.writer import ShardWriter
from mergekit_ray.core.errors import CheckpointError, Interrupted
from mergekit_ray.core.expressions import Load, is_copy
from mergekit_ray.core.plan import InputModel, Shard
from mergekit_ray.core.record import ShardRecord
from mergekit_ray.planning.windows import FIXED_BYTES, Window, batches
from mergekit_ray.runtime.evaluate import CHUNK_ELEMENTS, Evaluation, Piece, check_copy_finite
from mergekit_ray.runtime.held_inputs import HeldInputs
from mergekit_ray.runtime.pool import ComputePool
from mergekit_ray.runtime.scratch import TORCH_DTYPES, BufferPool
from mergekit_ray.storage.protocols import MappableSource, Sink, Source

_POLL_SECONDS: Final = 0.1

_MIN_MAPPED_BYTES: Final = 1 << 20
"""Smaller pieces are copied: a mapping costs more."""


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How a worker works; none of it changes the bytes written.

    Attributes:
        memory_bytes: budget for inputs, outputs and scratch.
        num_threads: compute threads.
        chunk_elements: elements computed at a time.
        allow_non_finite: let NaN and infinities pass.
    """

    memory_bytes: int
    num_threads: int = 1
    chunk_elements: int = CHUNK_ELEMENTS
    allow_non_finite: bool = False


@dataclass(slots=True)
class Progress:
    """What a worker has done so far; counters only grow.

    ``read_bytes`` are those of windows' inputs, so that they add up to the plan's: what is held from an earlier window
    counts again, though it is read once.
    """

    read_bytes: int = 0
    written_bytes: int = 0
    num_tensors: int = 0
    read_seconds: float = 0.0
    compute_seconds: float = 0.0
    write_seconds: float = 0.0

    @classmethod
    def total(cls, parts: Iterable[Progress]) -> Progress:
        """The sum of several workers' counters."""
        result = cls()
        for part in parts:
            for counter in fields(cls):
                setattr(result, counter.name, getattr(result, counter.name) + getattr(part, counter.name))
        return result


class _Budget:
    """Bytes that may be held at once. `take` waits until there is room; one taker that is alone is always let in."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._held = 0
        self._condition = threading.Condition()

    def take(self, num_bytes: int, stopped: threading.Event) -> None:
        with self._condition:
            while self._held and self._held + num_bytes > self._limit and not stopped.is_set():
                self._condition.wait(_POLL_SECONDS)
            self._held += num_bytes

    def give(self, num_bytes: int) -> None:
        with self._condition:
            self._held -= num_bytes
            self._condition.notify_all()


@dataclass(slots=True)
class _Inputs:
    """The bytes of a window's loads: mapped, in ``buffers`` (which go back to the pool), or held for several windows.

    ``shared`` are buffers whose last use this window is. Earlier windows may still be being written from them, so they
    go back once this one has been.
    """

    data: dict[Load, torch.Tensor] = field(default_factory=dict)
    buffers: list[torch.Tensor] = field(default_factory=list)
    shared: list[torch.Tensor] = field(default_factory=list)


@dataclass(slots=True)
class _Batch:
    windows: list[Window]
    inputs: list[_Inputs] = field(default_factory=list)


@dataclass(slots=True)
class _Output:
    data: torch.Tensor
    buffers: list[torch.Tensor]
    held_bytes: int
    ends_tensor: bool


class Worker:
    """Runs shards one after another.

    Args:
        inputs: the plan's input models, by key.
        sources: an open source per model key.
        sink: where shards go.
        record_folder: folder in the sink where the record of each finished shard is stored.
        options: budget and threads.
    """

    def __init__(
        self,
        inputs: Mapping[str, InputModel],
        sources: Mapping[str, Source],
        sink: Sink,
        record_folder: str,
        options: WorkerOptions,
    ) -> None:
        self.inputs = inputs
        self.sources = sources
        self._sink = sink
        self._record_folder = record_folder
        self.options = options
        self.pool = ComputePool(options.num_threads)
        self.buffers = BufferPool(options.memory_bytes - FIXED_BYTES)
        self.progress = Progress()

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
            _ShardRun(self, shard, writer, stop or threading.Event()).run()
            record = writer.finish()
        except BaseException:
            writer.abort()
            # What was in use is not given back one by one; the memory goes when the last reference does.
            self.buffers = BufferPool(self.options.memory_bytes - FIXED_BYTES)
            raise
        # Tensors without elements have no windows, and were written with the header.
        self.progress.num_tensors += sum(tensor.spec.num_elements == 0 for tensor in shard.tensors)
        self._sink.put(record_name(self._record_folder, shard), json.dumps(record.to_json()).encode())
        return record


def record_name(folder: str, shard: Shard) -> str:
    """Where the record of a shard is stored."""
    return f"{folder}/{shard.file}.json"


class _ShardRun:
    """The three threads of one shard."""

    def __init__(self, worker: Worker, shard: Shard, writer: ShardWriter, stop: threading.Event) -> None:
        self._options = worker.options
        self._model_inputs, self._sources = worker.inputs, worker.sources
        self._mappable = {key: source for key, source in worker.sources.items() if isinstance(source, MappableSource)}
        self._mapped_files: set[tuple[str, str]] = set()
        self._pool, self._buffers = worker.pool, worker.buffers
        self._progress = worker.progress
        self._writer = writer
        self._user_stop = stop
        self._failed = threading.Event()
        self._errors: list[BaseException] = []
        self._batches = list(batches(shard, self._options.memory_bytes))
        limit_bytes = self._options.memory_bytes - FIXED_BYTES
        self._held = HeldInputs(self._batches, limit_bytes, worker.sources.keys() - self._mappable.keys())
        self._budget = _Budget(limit_bytes - self._held.reserved_bytes)
        self._read: queue.Queue[_Batch | None] = queue.Queue()
        self._written: queue.Queue[_Output | None] = queue.Queue()

    def run(self) -> None:
        threads = [
            threading.Thread(target=self._guard, args=(self._read_all, self._read), name="reader"),
            threading.Thread(target=self._guard, args=(self._write_all, None), name="writer"),
        ]
        for thread in threads:
            thread.start()
        try:
            self._compute_all()
        except BaseException as error:  # noqa: BLE001 - kept and raised below, once the threads have ended
            self._fail(error)
        finally:
            self._written.put(None)
            for thread in threads:
                thread.join()
        if self._errors:
            raise self._errors[0]
        self._check_mapped_files()

    def _guard(self, work: Callable[[], None], sentinel: queue.Queue[_Batch | None] | None) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - handed to the calling thread
            self._fail(error)
        finally:
            if sentinel is not None:
                sentinel.put(None)

    def _fail(self, error: BaseException) -> None:
        self._errors.append(error)
        self._failed.set()

    def _check(self) -> bool:
        """Whether to go on. Raises if the user asked to stop."""
        if self._user_stop.is_set():
            raise Interrupted("the merge was stopped", remedy="run the same command to resume")
        return not self._failed.is_set()

    def _read_all(self) -> None:
        for windows in self._batches:
            if not self._check():
                return
            batch = _Batch(windows)
            self._budget.take(sum(window.memory_bytes for window in windows), self._failed)
            if not self._check():
                return
            requests: list[ByteRange] = []
            began = time.perf_counter()
            for window in windows:
                batch.inputs.append(self._inputs_of(window, requests))
            read_into(self._sources, requests)
            self._progress.read_seconds += time.perf_counter() - began
            self._progress.read_bytes += sum(window.read_bytes for window in windows)
            self._read.put(batch)

    def _inputs_of(self, window: Window, requests: list[ByteRange]) -> _Inputs:
        """Map what can be mapped, and add requests for the rest."""
        inputs = _Inputs()
        for load, (first, last) in window.needs.items():
            itemsize = load.spec.dtype.itemsize
            file = load.location.file
            start = load.location.start + first * itemsize
            stop = load.location.start + last * itemsize
            version = self._model_inputs[load.model].files[file].version
            mappable = self._mappable.get(load.model)
            if mappable is not None and stop - start >= _MIN_MAPPED_BYTES and start % itemsize == 0:
                mapped = mappable.map_range(file, start, stop, version=version)
                inputs.data[load] = torch.frombuffer(mapped, dtype=torch.uint8)
                self._mapped_files.add((load.model, file))
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
            requests.append(ByteRange(load.model, file, start, stop, version, _bytes_of(inputs.data[load])))
        return inputs

    def _check_mapped_files(self) -> None:
        """See that no file changed while it was used where it lies."""
        for model, file in sorted(self._mapped_files):
            source, planned = self._sources[model], self._model_inputs[model].files[file]
            stat = source.stat(file)
            if stat is None or stat.version != planned.version:
                raise CheckpointError(
                    "changed while it was being read: it is no longer the file that was planned for",
                    where=f"{source.uri}/{file}",
                    remedy="let nothing write to the inputs, and start the merge again",
                )

    def _compute_all(self) -> None:
        while (batch := self._read.get()) is not None:
            for window, held in zip(batch.windows, batch.inputs, strict=True):
                if not self._check():
                    return
                began = time.perf_counter()
                output = self._compute(window, held)
                self._progress.compute_seconds += time.perf_counter() - began
                self._written.put(output)

    def _compute(self, window: Window, held: _Inputs) -> _Output:
        spec = window.tensor.spec
        expression = window.tensor.expression
        ends_tensor = window.stop == spec.num_elements
        starts = window.needs
        pieces = {
            load: Piece(data.view(TORCH_DTYPES[load.spec.dtype]), starts[load][0]) for load, data in held.data.items()
        }
        if is_copy(expression) and isinstance(expression, Load):
            if not self._options.allow_non_finite:
                reference = self._model_inputs[expression.model].reference
                check_copy_finite(expression, pieces[expression].data, window.start, reference)
            return _Output(held.data[expression], [*held.buffers, *held.shared], window.memory_bytes, ends_tensor)
        evaluation = Evaluation(
            expression,
            pieces,
            self._pool,
            chunk_elements=self._options.chunk_elements,
            allow_non_finite=self._options.allow_non_finite,
            references={key: model.reference for key, model in self._model_inputs.items()},
        )
        out = self._buffers.take(window.write_bytes)
        data = out[: window.write_bytes]
        evaluation.fill(window.start, window.stop, data.view(TORCH_DTYPES[spec.dtype]))
        for buffer in held.buffers:
            self._buffers.give(buffer)
        self._budget.give(window.memory_bytes - window.write_bytes)
        return _Output(data, [out, *held.shared], window.write_bytes, ends_tensor)

    def _write_all(self) -> None:
        while (output := self._written.get()) is not None:
            if not self._check():
                continue
            began = time.perf_counter()
            self._writer.write(_bytes_of(output.data))
            self._progress.write_seconds += time.perf_counter() - began
            self._progress.written_bytes += output.data.numel()
            self._progress.num_tensors += output.ends_tensor
            for buffer in output.buffers:
                self._buffers.give(buffer)
            self._budget.give(output.held_bytes)


def _bytes_of(data: torch.Tensor) -> memoryview:
    """The memory of a uint8 tensor."""
    array: Any = data.numpy()
    return memoryview(array)


@contextlib.contextmanager
def single_threaded_torch() -> Iterator[None]:
    """Switch torch's intra-op threads off while our own pool computes, and back on afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Runs one shard: reading, computing and writing overlap under a byte budget.

    reader thread     batches of byte ranges -> input buffers; from stores, several batches at once
    stager thread     input buffers -> device, where there is one
    calling thread    windows in order: which are merged, and which exist already
    merge threads     expression over input buffers -> parts of the output (arithmetic on the compute pool)
    writer thread     output -> shard file, hashed on the way

On a device, the calling thread only queues work, and the writer waits for the download.

A batch takes memory from the budget before it is read and returns it as its parts are done, so a worker never holds
more than its budget, however large the model. The budget is the worker's: once a whole shard has been requested, the
next shard's reader may begin (`Worker.run`), and takes what this one's windows give back.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from mergekit_ray.checkpoint.writer import ShardWriter
from mergekit_ray.core.errors import Interrupted
from mergekit_ray.core.expressions import Stored
from mergekit_ray.core.plan import Shard
from mergekit_ray.evaluation.budget import Share
from mergekit_ray.evaluation.copies import check_copy_finite
from mergekit_ray.evaluation.host import HostEvaluation
from mergekit_ray.evaluation.pieces import Bytes, Pieces
from mergekit_ray.evaluation.strategy import Choice, Strategy, choose
from mergekit_ray.evaluation.threads import hold_torch
from mergekit_ray.planning.windows import MAX_PART_BYTES, READS_AHEAD, Window, batches
from mergekit_ray.reporting.progress import Progress
from mergekit_ray.worker.inputs import InputReader, Reading, WindowInputs
from mergekit_ray.worker.parts import Parts, cut
from mergekit_ray.worker.resources import Resources

if TYPE_CHECKING:
    from mergekit_ray.evaluation.device.evaluate import Staged

logger = logging.getLogger(__name__)

_MERGED_AT_ONCE: Final = 2
"""Windows in work on the compute pool: while one waits for its last run, or is between two passes, the other's keep the
threads busy."""


@dataclass(frozen=True, slots=True)
class _Read:
    """How a batch was read.

    Attributes:
        num_bytes: asked of stores.
        began, ended: on the clock of `time.perf_counter`.
    """

    num_bytes: int
    began: float
    ended: float


@dataclass(slots=True)
class _Batch:
    """Windows that are read together; their inputs are there once ``reading`` has a result."""

    windows: list[Window]
    inputs: list[WindowInputs] = field(default_factory=list)
    reading: Future[_Read] = field(default_factory=Future)


@dataclass(slots=True)
class _Ready:
    """A window whose inputs are there: in host memory, and on the device if they are wanted there."""

    window: Window
    inputs: WindowInputs
    staged: Staged | None = None

    @property
    def pieces(self) -> Pieces:
        """The bytes of each input, and the flat index of its first element."""
        return {load: (data, self.window.needs[load][0]) for load, data in self.inputs.data.items()}


@dataclass(slots=True)
class _Output:
    """A window's result.

    Attributes:
        window: what it is of. What that took of the budget is given back when it has been written.
        buffers: the same.
        data: the bytes, where they are in one place.
        parts: what they come in otherwise.
        merging: how many seconds it took to compute these; there when they have ended.
        seconds: spent computing it.
    """

    window: Window
    buffers: list[Bytes]
    data: Bytes | None = None
    parts: Parts | None = None
    merging: Future[float] | None = None
    seconds: float = 0.0


class ShardPipeline:
    """The threads of one shard.

    Args:
        resources: the worker's inputs, memory and threads.
        shard: to be computed.
        writer: where its bytes go.
        stop: when set, the shard is abandoned as soon as possible.
        on_read: called when nothing more of the shard will be asked for, at the end at the latest; on a device, whose
            session one shard has at a time, when all has been computed. Perhaps twice.

    Attributes:
        progress: of this shard.
    """

    def __init__(
        self,
        resources: Resources,
        shard: Shard,
        writer: ShardWriter,
        stop: threading.Event,
        on_read: Callable[[], None],
    ) -> None:
        self._options = resources.options
        self._sources = resources.sources
        self._references = {key: model.reference for key, model in resources.inputs.items()}
        self._pool, self._buffers = resources.pool, resources.buffers
        self.progress = Progress()
        self._on_read = on_read
        self._writer = writer
        self._user_stop = stop
        self._failed = threading.Event()
        self._errors: list[BaseException] = []
        self._batches = list(batches(shard, self._options.memory_bytes - self._options.thread_bytes, resources.mapped))
        self._inputs = InputReader(
            resources.inputs, resources.sources, resources.buffers, self._batches, resources.limit_bytes
        )
        self._budget = Share(resources.budget)
        self._choices = {
            tensor.spec.name: choose(
                tensor.expression, resources.device, allow_non_finite=self._options.allow_non_finite
            )
            for tensor in shard.tensors
        }
        for name, choice in self._choices.items():
            logger.debug("%s: %s: %s", name, choice.strategy, choice.why)
        # A device is not opened for what is done without.
        wants_device = any(choice.strategy is Strategy.DEVICE for choice in self._choices.values())
        self._session = resources.session() if wants_device else None
        self._read: queue.Queue[_Batch | None] = queue.Queue()
        self._read_until = 0.0
        num_merged = _MERGED_AT_ONCE if resources.pool.num_threads > 1 else 1
        self._merging = ThreadPoolExecutor(num_merged, thread_name_prefix="merge")
        is_far = any("://" in model.uri for model in resources.inputs.values())
        self._readers = ThreadPoolExecutor(READS_AHEAD if is_far else 1, thread_name_prefix="batch")
        self._staged: queue.Queue[_Ready | None] = queue.Queue()
        self._written: queue.Queue[_Output | None] = queue.Queue()

    @property
    def uses_device(self) -> bool:
        """Whether anything is computed elsewhere than on the CPU."""
        return self._session is not None

    def run(self) -> None:
        """Compute and write all windows. To be called once; see `Worker.run` for the errors."""
        threads = [
            threading.Thread(target=self._guard, args=(self._read_all, self._read), name="reader"),
            threading.Thread(target=self._guard, args=(self._write_all, None), name="writer"),
        ]
        if self._session is not None:
            threads.append(threading.Thread(target=self._guard, args=(self._stage_all, self._staged), name="stager"))
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
            # Nothing may be read or written in buffers that others are given.
            self._readers.shutdown(cancel_futures=True)
            self._merging.shutdown(cancel_futures=True)
            self._budget.give_all()
            self._on_read()
        if self._errors and isinstance(self._errors[0], Interrupted):
            raise self._errors[0]
        # Before other errors: what is wrong with bytes that changed while they were used is no fault of the model.
        self._inputs.check_unchanged()
        if self._errors:
            raise self._errors[0]

    def _guard(self, work: Callable[[], None], sentinel: queue.Queue[Any] | None) -> None:
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
            raise Interrupted("stopped", remedy="make the same call again to resume")
        return not self._failed.is_set()

    def _choice(self, ready: _Ready) -> Choice:
        return self._choices[ready.window.tensor.spec.name]

    def _read_all(self) -> None:
        # Given back at the end. Beside it there is room for the largest window.
        self._budget.take(self._inputs.reserved_bytes, self._failed)
        for windows in self._batches:
            if not self._check():
                return
            batch = _Batch(windows)
            self._budget.take(sum(window.memory_bytes for window in windows), self._failed)
            self._buffers.set_aside(sum(window.tensor.expression.scratch_bytes for window in windows))
            if not self._check():
                return
            reading = Reading()
            batch.inputs = [self._inputs.prepare(window, reading) for window in windows]
            batch.reading = self._readers.submit(self._read_batch, reading)
            self._read.put(batch)
        if self._session is None:
            self._on_read()

    def _read_batch(self, reading: Reading) -> _Read:
        began = time.perf_counter()
        num_bytes = reading.run(self._sources)
        return _Read(num_bytes, began, time.perf_counter())

    def _windows(self) -> Iterator[_Ready]:
        """What has been read, in order."""
        for batch in iter(self._read.get, None):
            reading = batch.reading.result()
            self.progress.fetched_bytes += reading.num_bytes
            self.progress.read_bytes += sum(window.read_bytes for window in batch.windows)
            # Batches that are read at the same time take their time once.
            self.progress.read_seconds += max(0.0, reading.ended - max(reading.began, self._read_until))
            self._read_until = max(self._read_until, reading.ended)
            for window, held in zip(batch.windows, batch.inputs, strict=True):
                yield _Ready(window, held)

    def _stage_all(self) -> None:
        """Bring what has been read to the device, ahead of its turn."""
        from mergekit_ray.evaluation.nodes.base import Piece  # noqa: PLC0415 - imports torch

        assert self._session is not None
        for ready in self._windows():
            if not self._check():
                return
            if self._choice(ready).strategy is Strategy.DEVICE:
                ready.staged = self._session.stage(ready.window.tensor.expression, Piece.of(ready.pieces), self._failed)
            self._staged.put(ready)

    def _compute_all(self) -> None:
        for ready in self._windows() if self._session is None else iter(self._staged.get, None):
            if not self._check():
                return
            began = time.perf_counter()
            output = self._compute(ready)
            output.seconds = time.perf_counter() - began
            self._written.put(output)
            if output.parts is not None and self._choice(ready).strategy is Strategy.DEVICE:
                self._hand_over(ready, output.parts)

    def _compute(self, ready: _Ready) -> _Output:
        window, held = ready.window, ready.inputs
        expression = window.tensor.expression
        buffers = [*held.buffers, *held.shared]
        strategy = self._choice(ready).strategy
        if strategy is Strategy.COPY:
            assert isinstance(expression, Stored)
            data = held.data[expression]
            if not self._options.allow_non_finite:
                check_copy_finite(expression, data, window.start, self._references)
            return _Output(window, buffers, data)
        parts = Parts(self._buffers, self._failed)
        if strategy is Strategy.DEVICE:
            return _Output(window, buffers, parts=parts)
        return _Output(window, buffers, parts=parts, merging=self._merging.submit(self._merge, ready, parts))

    def _merge(self, ready: _Ready, parts: Parts) -> float:
        """Compute a window's parts; the seconds that it took."""
        window, seconds = ready.window, 0.0
        itemsize = window.tensor.spec.dtype.itemsize
        evaluation = None
        try:
            for start, stop in cut(
                window.start, window.stop, itemsize, self._pool.num_threads, self._options.part_bytes
            ):
                num_bytes = (stop - start) * itemsize
                out = parts.take(num_bytes)
                began = time.perf_counter()
                evaluation = evaluation or HostEvaluation(
                    window.tensor.expression,
                    self._choice(ready),
                    ready.pieces,
                    self._pool,
                    chunk_elements=self._options.chunk_elements,
                    allow_non_finite=self._options.allow_non_finite,
                    references=self._references,
                )
                evaluation.fill(start, out[:num_bytes])
                seconds += time.perf_counter() - began
                parts.put(out, num_bytes)
        finally:
            parts.end()
        return seconds

    def _hand_over(self, ready: _Ready, parts: Parts) -> None:
        """To the device. The inputs are kept until the result is there: for messages, and for another try."""
        from mergekit_ray.evaluation.device.evaluate import DeviceEvaluation  # noqa: PLC0415 - imports torch
        from mergekit_ray.evaluation.nodes.base import Piece  # noqa: PLC0415
        from mergekit_ray.evaluation.scratch import as_tensor  # noqa: PLC0415

        hold_torch()
        window, dtype = ready.window, ready.window.tensor.spec.dtype
        assert self._session is not None
        evaluation = DeviceEvaluation(
            self._session,
            window.tensor.expression,
            Piece.of(ready.pieces),
            ready.staged,
            allow_non_finite=self._options.allow_non_finite,
            references=self._references,
        )
        try:
            for start, stop in cut(window.start, window.stop, dtype.itemsize, 1, MAX_PART_BYTES):
                num_bytes = (stop - start) * dtype.itemsize
                out = parts.take(num_bytes)
                finish = evaluation.start(start, stop, as_tensor(out[:num_bytes], dtype), is_last=stop == window.stop)
                parts.put(out, num_bytes, finish)
        finally:
            parts.end()
        self.progress.num_on_cpu += evaluation.lacked_memory

    def _write_all(self) -> None:
        while (output := self._written.get()) is not None:
            if not self._check():
                continue
            if output.data is not None:
                self._write(output.data.data)
            if output.parts is not None:
                output.parts.write(self._write)
            if output.merging is not None:
                output.seconds += output.merging.result()
            self.progress.compute_seconds += output.seconds
            window = output.window
            self.progress.num_tensors += window.stop == window.tensor.spec.num_elements
            for buffer in output.buffers:
                self._buffers.give(buffer)
            self._buffers.set_aside(-window.tensor.expression.scratch_bytes)
            self._budget.give(window.memory_bytes)

    def _write(self, data: memoryview) -> None:
        began = time.perf_counter()
        self._writer.write(data)
        self.progress.write_seconds += time.perf_counter() - began
        self.progress.written_bytes += len(data)

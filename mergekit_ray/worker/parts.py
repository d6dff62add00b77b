"""Merged parts on their way to the writer, through a few buffers that are reused."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import Final

from mergekit_ray.evaluation.pieces import Bytes
from mergekit_ray.planning.windows import MAX_PART_BYTES, PARTS_AT_ONCE
from mergekit_ray.worker.buffers import BufferPool

PART_BYTES: Final = 4 << 20
"""Of a part, for each thread that computes it. With much less, threads wait for each other too often. With much more,
the part has left the processor's cache by the time it is hashed and written."""

_ALIGNMENT: Final = 1 << 16
"""Parts but the last have a multiple of so many elements."""

_POLL_SECONDS: Final = 0.1


def _nothing() -> None:
    pass


class Parts:
    """The result of a window on its way from the thread that merges it to the one that writes it.

    Args:
        buffers: for the parts.
        failed: when set, threads that wait for room stop waiting.
    """

    def __init__(self, buffers: BufferPool, failed: threading.Event) -> None:
        self._buffers = buffers
        self._failed = failed
        self._room = threading.Semaphore(PARTS_AT_ONCE)
        self._parts: queue.SimpleQueue[tuple[Bytes, int, Callable[[], None]] | None] = queue.SimpleQueue()

    def take(self, num_bytes: int) -> Bytes:
        """A buffer for the next part, once there is room.

        Raises:
            CancelledError: nobody wants it any more.
        """
        while not self._failed.is_set():
            if self._room.acquire(timeout=_POLL_SECONDS):
                return self._buffers.take(num_bytes)
        raise CancelledError

    def put(self, buffer: Bytes, num_bytes: int, finish: Callable[[], None] = _nothing) -> None:
        """The next part is in the first bytes of a buffer, once ``finish`` has returned."""
        self._parts.put((buffer, num_bytes, finish))

    def end(self) -> None:
        """There are no more parts."""
        self._parts.put(None)

    def write(self, write: Callable[[memoryview], None]) -> None:
        """Write each part as it comes, until they end."""
        for buffer, num_bytes, finish in iter(self._parts.get, None):
            finish()
            write(buffer[:num_bytes].data)
            self._buffers.give(buffer)
            self._room.release()


def cut(
    start: int, stop: int, itemsize: int, num_threads: int, part_bytes: int = PART_BYTES
) -> Iterator[tuple[int, int]]:
    """Parts ``[first, last)`` of elements ``[start, stop)``, of about the same length.

    Args:
        start: flat index of the first element.
        stop: of the one after the last.
        itemsize: bytes of an element.
        num_threads: that compute a part together.
        part_bytes: of a part, for each of them; of all together `MAX_PART_BYTES` at most.
    """
    num_elements = stop - start
    num_parts = max(1, -(-num_elements * itemsize // min(part_bytes * num_threads, MAX_PART_BYTES)))
    step = -(-num_elements // (num_parts * _ALIGNMENT)) * _ALIGNMENT
    for first in range(start, stop, step):
        yield first, min(first + step, stop)

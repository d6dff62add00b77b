"""Memory that windows are read into and written from."""

from __future__ import annotations

import threading

import numpy as np

from mergekit_ray.evaluation.pieces import Bytes


class BufferPool:
    """Byte buffers for inputs and outputs, reused by size class.

    Sizes are rounded up to eighths of a power of two, so that a buffer is at most an eighth larger than asked for.
    If a new buffer would exceed the limit, idle buffers of other sizes are freed, the oldest first.

    Args:
        limit_bytes: what buffers in use, idle ones and what is set aside may take together.

    Attributes:
        idle: the buffers that have been given back, the oldest first.
        total_bytes: of these, of those in use, and what is set aside.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self.idle: list[Bytes] = []
        self.total_bytes = 0
        self._lock = threading.Lock()

    @staticmethod
    def size_class(num_bytes: int) -> int:
        """Bytes really taken for a buffer of ``num_bytes``."""
        step = max(4096, 1 << max(0, (num_bytes - 1).bit_length() - 4))
        return max(step, -(-num_bytes // step) * step)

    def take(self, num_bytes: int) -> Bytes:
        """At least ``num_bytes``, to be given back with `give`."""
        size = self.size_class(num_bytes)
        with self._lock:
            for i in range(len(self.idle) - 1, -1, -1):
                if self.idle[i].size == size:
                    return self.idle.pop(i)
            self._add(size)
        # numpy asks for huge pages (a 512th of the page faults); torch does so only if its environment says.
        return np.empty(size, dtype=np.uint8)

    def set_aside(self, num_bytes: int) -> None:
        """Leave room for memory that is not taken from here; a negative number gives it back."""
        with self._lock:
            self._add(num_bytes)

    def _add(self, num_bytes: int) -> None:
        while self.idle and self.total_bytes + num_bytes > self._limit_bytes:
            self.total_bytes -= self.idle.pop(0).size
        self.total_bytes += num_bytes

    def give(self, buffer: Bytes) -> None:
        """Return a buffer; its content may be overwritten from now on."""
        with self._lock:
            self.idle.append(buffer)

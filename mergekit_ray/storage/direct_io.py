"""Writing large files around the page cache.

A merge's output is not read again soon. Written the ordinary way it is copied into the page cache, pushes the inputs
out of it, and stalls the writer when the kernel decides to catch up. With ``O_DIRECT`` (Linux) the disk takes it
straight from a small aligned buffer, for a fraction of the CPU time. File systems without it (some network ones) and
those in memory are written the ordinary way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
from typing import Any

import numpy as np

from mergekit_ray.storage.file_system import is_in_memory

_STAGE_BYTES = 8 << 20
_ALIGN_BYTES = 4096
_WRITEBACK_BYTES = 32 << 20
_UNSUPPORTED = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}

MIN_DIRECT_BYTES = 4 * _STAGE_BYTES
"""Smaller files are written the ordinary way."""


class AppendingFile:
    """Appends to an open, empty file; direct where that works.

    Args:
        fd: of the file, open for reading and writing. The caller keeps it.
        num_bytes: what will be written, at least about.

    `finish` must be called before the file is complete. All methods raise OSError as the system gives it.
    """

    def __init__(self, fd: int, num_bytes: int) -> None:
        self._fd = fd
        self._offset = 0
        self._num_flushed = 0
        self._stage: np.ndarray[Any, np.dtype[np.uint8]] | None = None
        self._num_staged = 0
        if num_bytes >= MIN_DIRECT_BYTES and not is_in_memory(fd) and self._set_direct(on=True):
            self._stage = np.frombuffer(mmap.mmap(-1, _STAGE_BYTES), dtype=np.uint8)

    def write(self, data: memoryview) -> None:
        """Append all of ``data``."""
        while data:
            if self._stage is None:
                self._write_through(data)
                return
            count = min(len(data), _STAGE_BYTES - self._num_staged)
            # By numpy, which lets other threads run meanwhile.
            np.copyto(self._stage[self._num_staged : self._num_staged + count], np.frombuffer(data[:count], np.uint8))
            self._num_staged += count
            data = data[count:]
            if self._num_staged == _STAGE_BYTES:
                self._flush()

    def finish(self) -> None:
        """Write what is still in the buffer and give the file its exact length."""
        if self._stage is not None:
            length = self._offset + self._num_staged
            self._flush()
            os.ftruncate(self._fd, length)
            self._stage = None

    def _flush(self) -> None:
        if self._stage is None or not self._num_staged:
            return
        padded = -(-self._num_staged // _ALIGN_BYTES) * _ALIGN_BYTES
        view = self._stage.data
        done = 0
        while done < padded:
            try:
                done += os.pwrite(self._fd, view[done:padded], self._offset + done)
            except OSError as error:
                if error.errno not in _UNSUPPORTED or not self._set_direct(on=False):
                    raise
        self._offset += self._num_staged
        self._num_staged = 0

    def _write_through(self, data: memoryview) -> None:
        while data:
            count = os.pwrite(self._fd, data, self._offset)
            self._offset += count
            data = data[count:]
        if self._offset - self._num_flushed >= _WRITEBACK_BYTES and hasattr(os, "posix_fadvise"):
            # Let the disk begin, so that the sync at the end finds little left to do: on Linux this starts writing
            # dirty pages, and drops only clean ones, of which there are none yet.
            os.posix_fadvise(self._fd, self._num_flushed, self._offset - self._num_flushed, os.POSIX_FADV_DONTNEED)
            self._num_flushed = self._offset

    def _set_direct(self, *, on: bool) -> bool:
        """Whether the file now is (or is no longer) written around the page cache; False if it cannot be changed."""
        flag = getattr(os, "O_DIRECT", 0)
        if not flag:
            return False
        with contextlib.suppress(OSError):
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
            if bool(flags & flag) == on:
                return on
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | flag if on else flags & ~flag)
            return True
        return False

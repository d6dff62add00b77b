"""Writing large files around the page cache.

A merge's output is not read again soon. Written the ordinary way it is copied into the page cache, pushes the inputs
out of it, and stalls the writer when the kernel decides to catch up. With ``O_DIRECT`` (Linux) the disk takes it
straight from a small aligned buffer, for a fraction of the CPU time; of two such buffers one is filled while the other
is written. File systems without it (some network ones) and those in memory are written the ordinary way.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from concurrent.futures import Future, ThreadPoolExecutor

from mergekit_ray.storage.local.file_system import is_in_memory

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

    `finish` must be called before the file is complete, and `finish` or `discard` before ``fd`` is closed. All methods
    raise OSError as the system gives it, for bytes of an earlier call as well.
    """

    def __init__(self, fd: int, num_bytes: int) -> None:
        self._fd = fd
        self._stages: _Stages | None = None
        self._offset = 0
        self._num_flushed = 0
        if num_bytes >= MIN_DIRECT_BYTES and not is_in_memory(fd) and _set_direct(fd, on=True):
            self._stages = _Stages(fd)

    def write(self, data: memoryview) -> None:
        """Append all of ``data``, which may be overwritten afterwards."""
        if self._stages is not None:
            self._stages.write(data)
        else:
            self._write_through(data)

    def finish(self) -> None:
        """Write what is still in a buffer and give the file its exact length."""
        if self._stages is not None:
            length = self._stages.finish()
            os.ftruncate(self._fd, length)

    def discard(self) -> None:
        """Let go of what has not been written yet; afterwards nothing touches the file any more."""
        if self._stages is not None:
            self._stages.discard()

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


class _Stages:
    """Two aligned buffers, one being filled while a thread writes the other."""

    def __init__(self, fd: int) -> None:
        import numpy as np  # noqa: PLC0415 - plans are made without it

        self._fd = fd
        # numpy asks for huge pages, so that writing a buffer touches few pages.
        memory = np.empty(2 * _STAGE_BYTES + _ALIGN_BYTES, np.uint8)
        first = -memory.__array_interface__["data"][0] % _ALIGN_BYTES
        self._filling, self._spare = memory[first : first + 2 * _STAGE_BYTES].reshape(2, _STAGE_BYTES)
        self._num_staged = 0
        self._offset = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="direct")
        self._writing: Future[None] | None = None

    def write(self, data: memoryview) -> None:
        import numpy as np  # noqa: PLC0415

        while data:
            count = min(len(data), _STAGE_BYTES - self._num_staged)
            # By numpy, which lets other threads run meanwhile.
            np.copyto(self._filling[self._num_staged : self._num_staged + count], np.frombuffer(data[:count], np.uint8))
            self._num_staged += count
            data = data[count:]
            if self._num_staged == _STAGE_BYTES:
                self._flush()

    def finish(self) -> int:
        """The length of the file."""
        length = self._offset + self._num_staged
        try:
            self._flush()
            self._settle()
        finally:
            self._thread.shutdown()
        return length

    def discard(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _flush(self) -> None:
        """Have what is staged written, once the other buffer has been."""
        if not self._num_staged:
            return
        self._settle()
        padded = -(-self._num_staged // _ALIGN_BYTES) * _ALIGN_BYTES
        self._writing = self._thread.submit(_write_direct, self._fd, self._filling[:padded].data, self._offset)
        self._offset += self._num_staged
        self._num_staged = 0
        self._filling, self._spare = self._spare, self._filling

    def _settle(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()


def _write_direct(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(fd, data[done:], offset + done)
        except OSError as error:
            if error.errno not in _UNSUPPORTED or not _set_direct(fd, on=False):
                raise


def _set_direct(fd: int, *, on: bool) -> bool:
    """Whether the file now is (or is no longer) written around the page cache; False if it cannot be changed."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return False
    with contextlib.suppress(OSError):
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if bool(flags & flag) == on:
            return on
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | flag if on else flags & ~flag)
        return True
    return False

"""Parts of local files mapped into memory: the page cache's own pages, not copies of them."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

from mergekit_ray.storage.local.file_system import libc

_MADV_POPULATE_READ = 22  # Linux 5.14, <linux/mman.h>; not yet a constant of Python's mmap


def map_file(fd: int, start: int, end: int) -> memoryview:
    """Bytes ``[start, end)`` of an open file, brought into the page cache.

    The mapping is private: nothing written to it would reach the file. It goes away with the last view of it.

    Raises:
        OSError: the file system cannot map files, or the disk failed.
    """
    first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
    mapped = mmap.mmap(fd, end - first, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=first)
    _populate(mapped)
    return memoryview(mapped)[start - first :]


def _populate(mapped: mmap.mmap) -> None:
    """Read all of it in now, without holding the interpreter's lock. On older kernels it is read as it is touched."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    if libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), _MADV_POPULATE_READ) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):  # what an older kernel says
        raise OSError(code, os.strerror(code))

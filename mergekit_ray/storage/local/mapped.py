"""Parts of local files mapped into memory: the page cache's own pages, not copies of them."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

from mergekit_ray.storage.local.fault_guard import Fault, watch
from mergekit_ray.storage.local.file_system import libc

_MADV_POPULATE_READ = 22  # Linux 5.14, <linux/mman.h>; not yet a constant of Python's mmap


def map_file(fd: int, start: int, end: int) -> tuple[memoryview, Fault]:
    """Bytes ``[start, end)`` of an open file, brought into the page cache, and whether they could not all be read.

    The mapping is private: nothing written to it would reach the file. It goes away with the last view of it.

    Raises:
        OSError: the file system cannot map files, the disk failed, or the file has become shorter.
    """
    first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        mapped = mmap.mmap(fd, end - first, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=first)
    except ValueError as error:  # what Python says of a file that is too short
        raise OSError(errno.ENXIO, str(error)) from error
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    fault = watch(mapped, address)
    _populate(address, len(mapped))
    return memoryview(mapped)[start - first :], fault


def _populate(address: int, num_bytes: int) -> None:
    """Read all of it in now, without holding the interpreter's lock. On older kernels it is read as it is touched."""
    if libc().madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), _MADV_POPULATE_READ) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS):  # what an older kernel says
        raise OSError(code, os.strerror(code))

"""What kind of file system an open file is on."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from typing import Any, Final

_TMPFS_MAGIC: Final = 0x01021994  # <linux/magic.h>
_STATFS_BYTES: Final = 512
"""More than a ``struct statfs`` takes anywhere."""


def is_in_memory(fd: int) -> bool:
    """Whether a file is held in memory (Linux's tmpfs, such as ``/dev/shm``). False where that cannot be told."""
    if not sys.platform.startswith("linux"):
        return False
    status = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc().fstatfs(ctypes.c_int(fd), status) != 0:
        return False
    # ``f_type`` comes first; it is a long, on a few processors an int. The magic number fits either, little-endian.
    return int.from_bytes(status.raw[:4], sys.byteorder) == _TMPFS_MAGIC


def free_bytes(fd: int) -> int:
    """Bytes that an ordinary user can still write to the file system of an open file."""
    status = os.fstatvfs(fd)
    return status.f_bavail * status.f_frsize


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None)

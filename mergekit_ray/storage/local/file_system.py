"""What kind of file system an open file is on."""

from __future__ import annotations

import ctypes
import functools
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
    if libc().fstatfs(ctypes.c_int(fd), status) != 0:
        return False
    # ``f_type`` comes first; it is a long, on a few processors an int. The magic number fits either, little-endian.
    return int.from_bytes(status.raw[:4], sys.byteorder) == _TMPFS_MAGIC


@functools.cache
def libc() -> Any:
    """The C library, whose error numbers `ctypes.get_errno` tells."""
    return ctypes.CDLL(None, use_errno=True)

"""What kind of file system something is on, and what is there now."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path
from typing import Any, Final

_TMPFS_MAGIC: Final = 0x01021994  # <linux/magic.h>
_STATFS_BYTES: Final = 512
"""More than a ``struct statfs`` takes anywhere."""

_AT_FDCWD: Final = -100  # <linux/fcntl.h>
_AT_STATX_FORCE_SYNC: Final = 0x2000
_STATX_BASIC_STATS: Final = 0x7FF  # <linux/stat.h>
_STATX_BYTES: Final = 256


def is_in_memory(fd: int) -> bool:
    """Whether a file is held in memory (Linux's tmpfs, such as ``/dev/shm``). False where that cannot be told."""
    if not sys.platform.startswith("linux"):
        return False
    status = ctypes.create_string_buffer(_STATFS_BYTES)
    if libc().fstatfs(ctypes.c_int(fd), status) != 0:
        return False
    # ``f_type`` comes first; it is a long, on a few processors an int. The magic number fits either, little-endian.
    return int.from_bytes(status.raw[:4], sys.byteorder) == _TMPFS_MAGIC


def refresh(root: Path, folder: Path) -> None:
    """Have the system ask the server of a network file system what is in ``folder`` now.

    NFS otherwise answers from memory, for up to a minute: a file that another machine has made is not found, and one
    that it has replaced is still the old one. Does nothing where that cannot be asked for.

    Args:
        root: of the store. It and all between it and ``folder`` are asked for as well: another may have made them.
        folder: in or below ``root``.
    """
    if not sys.platform.startswith("linux") or not hasattr(libc(), "statx"):
        return
    status = ctypes.create_string_buffer(_STATX_BYTES)
    below = [each for each in (folder, *folder.parents) if root in (each, *each.parents)]
    for each in (root.parent, *reversed(below)):
        libc().statx(_AT_FDCWD, os.fsencode(each), _AT_STATX_FORCE_SYNC, _STATX_BASIC_STATS, status)


@functools.cache
def libc() -> Any:
    """The C library, whose error numbers `ctypes.get_errno` tells."""
    return ctypes.CDLL(None, use_errno=True)

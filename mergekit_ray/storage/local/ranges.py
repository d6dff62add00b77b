"""Reading byte ranges of an open file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from mergekit_ray.storage.protocols import WritableBuffer

_MAX_VECTORS: Final = 1024  # IOV_MAX on Linux and macOS


def read_sorted(fd: int, wanted: Sequence[tuple[int, int, WritableBuffer]]) -> None:
    """Fill the buffers of ascending ranges, adjacent ones together.

    Raises:
        EOFError: the file ends before a range does.
    """
    index = 0
    while index < len(wanted):
        start, end, _ = wanted[index]
        views: list[WritableBuffer] = []
        while index < len(wanted) and (not views or wanted[index][0] == end):
            views.append(wanted[index][2])
            end = wanted[index][1]
            index += 1
        if index < len(wanted) and hasattr(os, "posix_fadvise"):
            # The disk fetches the next run while this one is copied.
            os.posix_fadvise(fd, wanted[index][0], wanted[index][1] - wanted[index][0], os.POSIX_FADV_WILLNEED)
        while views:
            count = os.preadv(fd, views[:_MAX_VECTORS], start)
            if count == 0:
                raise EOFError
            start += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]

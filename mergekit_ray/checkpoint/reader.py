"""Reading many byte ranges of many files of several models at once."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass

from mergekit_ray.storage.protocols import Source, WritableBuffer

_NUM_THREADS = 16
_LOCK = threading.Lock()
_POOL: list[ThreadPoolExecutor] = []


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A byte range of an input and where it goes.

    Attributes:
        model: key of the source.
        file: one of the model's files.
        start, stop: bytes of the file, end exclusive.
        version: of the file when the plan was made.
        buffer: exactly as long as the range.
    """

    model: str
    file: str
    start: int
    stop: int
    version: str
    buffer: WritableBuffer


def read_into(sources: Mapping[str, Source], requests: Sequence[ByteRange]) -> int:
    """Fill all buffers. Ranges of one file go to its store together; files are read concurrently.

    Args:
        sources: by model key.
        requests: in any order. Nothing is written into their buffers after this has returned, even by raising.

    Returns:
        How many bytes were asked of the stores.

    Raises:
        CheckpointError: a file is gone, cut short, or no longer at its version.
        StorageError: a store failed after retries.
    """
    by_file: dict[tuple[str, str, str], list[ByteRange]] = defaultdict(list)
    for request in requests:
        by_file[request.model, request.file, request.version].append(request)
    groups = list(by_file.values())
    tasks = [_pool().submit(_read_file, sources, group) for group in groups[1:]]
    try:
        num_bytes = _read_file(sources, groups[0]) if groups else 0
        return num_bytes + sum(task.result() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        wait(tasks)


def _read_file(sources: Mapping[str, Source], group: Sequence[ByteRange]) -> int:
    first = group[0]
    return sources[first.model].read_ranges(
        first.file,
        [(request.start, request.stop) for request in group],
        [request.buffer for request in group],
        version=first.version,
    )


def _pool() -> ThreadPoolExecutor:
    """The threads of this process that read files; started when first needed, and idle most of the time."""
    with _LOCK:
        if not _POOL:
            _POOL.append(ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="read"))
        return _POOL[0]

"""Requests over a network: which pause lies between two tries, and many at once."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

from mergekit_ray.core.errors import CheckpointError, MergekitRayError
from mergekit_ray.storage.protocols import FileStat, Sink, Source, WritableBuffer
from mergekit_ray.storage.ranges import Fetch, plan_fetches

T = TypeVar("T")

NUM_READERS: Final = 16
_MAX_GAP_BYTES: Final = 1 << 20
PART_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Exponential backoff with full jitter.

    Attributes:
        max_attempts: including the first.
        base_seconds: upper bound of the first pause; it doubles with each.
        max_seconds: upper bound of any pause.
    """

    max_attempts: int = 8
    base_seconds: float = 0.2
    max_seconds: float = 20.0

    def pause(self, attempt: int, asked_seconds: float = 0.0) -> float:
        """Seconds to wait after the failure of attempt ``attempt`` (from 1); no less than a server asks for."""
        bound = min(self.base_seconds * 2.0 ** (attempt - 1), self.max_seconds)
        return max(random.uniform(0.0, bound), min(asked_seconds, self.max_seconds))


class Explain(Protocol):
    """Says what a fault means."""

    def __call__(self, error: Exception, *, num_attempts: int) -> MergekitRayError:
        """The error to raise, after so many tries."""
        ...


def retry(
    policy: RetryPolicy,
    attempt: Callable[[], T],
    *,
    kinds: tuple[type[Exception], ...],
    is_transient: Callable[[Exception], bool],
    explain: Explain,
    asked_seconds: Callable[[Exception], float] = lambda _: 0.0,
) -> T:
    """``attempt()`` until it succeeds.

    Args:
        policy: how often and how soon.
        attempt: sends the request.
        kinds: the exceptions by which a request fails; any other passes through.
        is_transient: whether another try may cure a fault.
        explain: the error to raise for the last fault.
        asked_seconds: how long the server wants to be left alone; 0 if it does not say.

    Raises:
        MergekitRayError: what ``explain`` makes of a lasting fault.
    """
    number = 0
    while True:
        number += 1
        try:
            return attempt()
        except kinds as error:
            if not is_transient(error) or number >= policy.max_attempts:
                raise explain(error, num_attempts=number) from error
            seconds = asked_seconds(error)
        time.sleep(policy.pause(number, seconds))


def read_whole(source: Source, name: str, max_bytes: int) -> bytes:
    """A small file, by its head.

    Raises:
        CheckpointError: see `Source.read`.
    """
    data, stat = source.read_head(name, max_bytes)
    if stat.num_bytes > max_bytes:
        raise CheckpointError(
            f"{stat.num_bytes} bytes, more than the {max_bytes} such a file may have", where=f"{source.uri}/{name}"
        )
    return data


def write_whole(sink: Sink, name: str, data: bytes) -> FileStat:
    """Write a small file through an upload, which asks the store's guard.

    Raises:
        StorageError: see `Upload.commit`.
    """
    upload = sink.open(name, len(data))
    try:
        upload.write(data)
        return upload.commit()
    finally:
        upload.abort()


class RangeReader:
    """Threads that fetch byte ranges.

    Ranges up to 1 MiB apart are one request, requests have up to 16 MiB, up to 16 run at once.

    Args:
        name: of the threads.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def read(
        self,
        ranges: Sequence[tuple[int, int]],
        buffers: Sequence[WritableBuffer],
        fetch: Callable[[Fetch], None],
    ) -> int:
        """Fill the buffers; see `Source.read_ranges`. Nothing is in flight when this returns or raises.

        Args:
            ranges: ``(start, end)`` in bytes.
            buffers: one for each range.
            fetch: carries one request out.
        """
        fetches = plan_fetches(ranges, buffers, max_gap_bytes=_MAX_GAP_BYTES, part_bytes=PART_BYTES)
        if len(fetches) > 1:
            self._run(fetches, fetch)
        elif fetches:
            fetch(fetches[0])
        return sum(fetch.end - fetch.start for fetch in fetches)

    def close(self) -> None:
        """End the threads. Others are started when they are needed."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def _run(self, fetches: Sequence[Fetch], fetch: Callable[[Fetch], None]) -> None:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(NUM_READERS, thread_name_prefix=self._name)
            tasks = [self._pool.submit(fetch, each) for each in fetches]
        try:
            for task in tasks:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            wait(tasks)  # nothing may write into the caller's buffers after this returns

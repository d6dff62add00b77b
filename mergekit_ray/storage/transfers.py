"""Requests over a network: which pause lies between two tries, and many at once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from typing import TypeVar

from mergekit_ray.core.errors import MergekitRayError
from mergekit_ray.storage.ranges import Fetch

T = TypeVar("T")


class ShortBodyError(OSError):
    """An answer that ended before it was complete."""


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


def retry(
    policy: RetryPolicy,
    attempt: Callable[[], T],
    *,
    kinds: tuple[type[Exception], ...],
    asked_pause: Callable[[Exception], float | None],
    explain: Callable[[Exception, int], MergekitRayError],
) -> T:
    """``attempt()`` until it succeeds.

    Args:
        policy: how often and how soon.
        attempt: sends the request.
        kinds: the exceptions by which a request fails; any other passes through.
        asked_pause: seconds the server wants to be left alone (0 if it does not say), or None for a fault that another
            try will not cure.
        explain: the error to raise for the last fault, given it and the number of tries.

    Raises:
        MergekitRayError: what ``explain`` makes of a lasting fault.
    """
    number = 0
    while True:
        number += 1
        try:
            return attempt()
        except kinds as error:
            seconds = asked_pause(error)
            if seconds is None or number >= policy.max_attempts:
                raise explain(error, number) from error
        time.sleep(policy.pause(number, seconds))


def fetch_all(fetches: Sequence[Fetch], fetch: Callable[[Fetch], None], executor: Callable[[], Executor]) -> None:
    """Run requests at once; a single one on the calling thread. Nothing is in flight when this returns or raises."""
    if len(fetches) <= 1:
        for only in fetches:
            fetch(only)
        return
    pool = executor()
    tasks = [pool.submit(fetch, each) for each in fetches]
    try:
        for task in tasks:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        wait(tasks)  # nothing may write into the caller's buffers after this returns

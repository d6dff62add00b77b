"""Two merges into one output, each stopped and continued where a test wants: before any change that it makes."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from mergekit_ray.core.errors import MergekitRayError
from mergekit_ray.output.holder import Holder
from mergekit_ray.output.lease import Lease
from mergekit_ray.storage.fence import Fence
from mergekit_ray.storage.local import changes
from mergekit_ray.storage.s3 import store as s3_store
from support.waiting import DEADLINE_SECONDS

_CHANGES = {
    *("PutObject", "CreateMultipartUpload", "UploadPart", "UploadPartCopy"),
    *("CompleteMultipartUpload", "AbortMultipartUpload", "DeleteObjects"),
}
"""Requests to S3 that change something."""


@dataclass
class Driver:
    """One merge, on threads of its own: all those that its first thread, and theirs, start.

    Attributes:
        work: the merge.
        number: changes it was about to make so far.
        tokens: of the leases it has asked for.
        lease: which of all that were held it has held last, counted from 1; 0 for none.
        outcome: what it raised; None if it was published.
    """

    work: Callable[[], object]
    number: int = 0
    tokens: set[str] = field(default_factory=set)
    lease: int = 0
    outcome: BaseException | None = None
    stop_at: int | None = None
    is_stopped: bool = False
    thread: threading.Thread | None = None

    @property
    def has_ended(self) -> bool:
        """Whether it is no longer running, nor stopped."""
        return self.thread is not None and not self.thread.is_alive()

    @property
    def is_published(self) -> bool:
        """Whether it has ended well."""
        return self.has_ended and self.outcome is None


class Schedule:
    """Runs drivers, and stops each before a change.

    A driver that is stopped counts as one whose lease has expired, and been watched: the other takes it over at once.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._drivers: dict[threading.Thread, Driver] = {}
        self._leases = itertools.count(1)

    def run(self, driver: Driver, stop_at: int | None = None) -> None:
        """Start a driver, or let it go on, until it has ended or is about to make this change of its own."""
        with self._changed:
            driver.stop_at, driver.is_stopped = stop_at, False
            self._changed.notify_all()
        if driver.thread is None:
            driver.thread = threading.Thread(target=self._work, args=(driver,), daemon=True)
            self._drivers[driver.thread] = driver
            driver.thread.start()
        with self._changed:
            assert self._changed.wait_for(
                lambda: driver.is_stopped or not driver.thread or not driver.thread.is_alive(), DEADLINE_SECONDS
            ), "the driver neither ended nor came to its next change"

    def _work(self, driver: Driver) -> None:
        try:
            driver.work()
        except MergekitRayError as error:
            driver.outcome = error
        finally:
            # What waits for the end of this thread looks again until it is over.
            threading.Thread(target=self._tell_of_end, args=(threading.current_thread(),), daemon=True).start()

    def _tell_of_end(self, thread: threading.Thread) -> None:
        thread.join()
        with self._changed:
            self._changed.notify_all()

    def _current(self) -> Driver | None:
        return self._drivers.get(threading.current_thread())

    def before_change(self) -> None:
        """Called by whoever is about to change something."""
        driver = self._current()
        if driver is None:
            return
        with self._changed:
            driver.number += 1
            if driver.stop_at is not None and driver.number >= driver.stop_at:
                driver.is_stopped = True
                self._changed.notify_all()
            self._changed.wait_for(lambda: not driver.is_stopped)

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """In this block every change to a folder or a bucket is one before which a driver may be stopped."""
        watched = [(Path, "replace"), (Path, "rename"), (Path, "unlink"), (Path, "mkdir"), (os, "link")]
        replaced: list[tuple[Any, str, Any]] = [
            (threading.Thread, "start", self._start(threading.Thread.start)),
            (Holder, "has_ended", property(self._has_ended)),
            (Holder, "of_this_process", self._of_this_process(Holder.of_this_process)),
            (Lease, "__init__", self._acquired(Lease.__init__)),
            (Fence, "check", self._checked(Fence.check)),
            (s3_store, "make_client", self._client(s3_store.make_client)),
            (changes, "LOCK_SECONDS", 0.05),
            *((target, name, self._watched(getattr(target, name))) for target, name in watched),
        ]
        with contextlib.ExitStack() as stack:
            for target, name, value in replaced:
                stack.enter_context(mock.patch.object(target, name, value))
            yield

    def _start(self, start: Callable[..., None]) -> Callable[..., None]:
        def started(thread: threading.Thread) -> None:
            driver = self._current()
            if driver is not None:
                self._drivers[thread] = driver
            start(thread)

        return started

    def _has_ended(self, holder: Holder) -> bool:
        return any(driver.is_stopped and holder.token in driver.tokens for driver in self._drivers.values())

    def _of_this_process(self, make: Callable[..., Holder]) -> Callable[..., Holder]:
        def of_this_process(*args: Any, **kwargs: Any) -> Holder:
            holder = make(*args, **kwargs)
            driver = self._current()
            if driver is not None:
                driver.tokens.add(holder.token)
            return holder

        return of_this_process

    def _acquired(self, make: Callable[..., None]) -> Callable[..., None]:
        def acquired(*args: Any, **kwargs: Any) -> None:
            driver = self._current()
            if driver is not None:
                driver.lease = next(self._leases)
            make(*args, **kwargs)

        return acquired

    def _checked(self, check: Callable[..., None]) -> Callable[..., None]:
        def checked(fence: Fence, source: Any) -> None:
            check(fence, source)
            self.before_change()  # right after the lease was seen to be ours

        return checked

    def _client(self, make: Callable[..., Any]) -> Callable[..., Any]:
        def before_send(request: Any, event_name: str, **_: Any) -> None:
            del request
            if event_name.rpartition(".")[2] in _CHANGES:
                self.before_change()

        def client(*args: Any, **kwargs: Any) -> Any:
            made = make(*args, **kwargs)
            made.meta.events.register("before-send.s3", before_send)
            return made

        return client

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.before_change()
            return function(*args, **kwargs)

        return watched

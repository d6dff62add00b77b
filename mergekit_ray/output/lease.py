"""One driver per output: a lease beside the model, ``.mergekit-ray/lease.json``, that its holder renews while it works.

A second driver is refused; the message says who holds the lease. A driver gives its lease up when it succeeds or fails.
The lease of a driver that died is taken over:

- at once, if it ran on this machine (same boot, same process namespace) and its process is gone;
- else when it has not been renewed for its whole term by the clock, *and* does not change while it is watched for one
  and a half renewals. Clocks only decide how soon it is watched, so a wrong one cannot take a lease from a living
  driver. It can only delay the takeover of a dead driver's lease, by as much as it is wrong.

A lease can promise what its store can do: `Sink.put_if_absent` has one winner among drivers that find no lease,
`ConditionalSink.replace` one among drivers that take over or renew. If a store lacks the latter, two drivers that take
over the same dead lease at the same moment may both begin. Each looks before every renewal and before publishing, and
the one whose lease was overwritten stops there.

A driver that was stopped may go on at any time after it has lost its lease. Its changes are then refused (see
`storage.fence`): everything a merge writes goes through `Lease.sink`.

While the lease exists, everybody who may read the output sees the driver's host, process and user in it.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

from mergekit_ray.core.errors import CheckpointError, Interrupted, MergekitRayError, StorageError
from mergekit_ray.output.holder import HELD, LONG_TERM, Holder, Term
from mergekit_ray.reporting.reporters import Reporter
from mergekit_ray.reporting.signals import RESUME_CALL
from mergekit_ray.storage.fence import LEASE_FILE, MAX_LEASE_BYTES, Fence, guarded
from mergekit_ray.storage.protocols import ConditionalSink, PublishingSink, RemainsSink, Sink

_MAX_ATTEMPTS: Final = 20
_MAX_POLL_SECONDS: Final = 5.0


class Lease:
    """A lease that is held. Made by `hold`.

    Args:
        sink: the output.
        mine: who holds it.
        version: of the file.
        clock: seconds since 1970, as `time.time`.

    Attributes:
        fence: of what is written under it.
        sink: the output, behind that fence.
    """

    def __init__(self, sink: Sink, mine: Holder, version: str, clock: Callable[[], float]) -> None:
        self.fence = Fence(sink.uri, mine.token)
        self.sink = guarded(sink, self.fence)
        self._sink = sink
        self._clock = clock
        self._mine = mine
        self._version = version
        self._confirmed = clock()
        self._lost: StorageError | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Check that it is still held, as far as is known; asks the store only after a term without a renewal.

        Raises:
            StorageError: it is another's by now.
        """
        if self._lost is None and self._clock() - self._confirmed > self._mine.term.seconds:
            self.confirm()
        if self._lost is not None:
            raise self._lost

    def confirm(self) -> None:
        """Renew it now.

        Raises:
            StorageError: it is another's by now, or the store failed.
        """
        with self._lock:
            if self._lost is None:
                self._renew()
        if self._lost is not None:
            raise self._lost

    def give_up(self, worker: str) -> None:
        """Refuse whatever this worker writes from now on, see `Fence`.

        Raises:
            StorageError: as `confirm`.
        """
        with self._lock:
            self._mine = replace(self._mine, given_up=(*self._mine.given_up, worker))
        self.confirm()

    def rest(self) -> None:
        """Renew it no more. It lasts for its term."""
        self._done.set()
        self._thread.join()

    def release(self) -> None:
        """Release it, if it is still ours. Failures are ignored: it expires by itself."""
        self.rest()
        with contextlib.suppress(MergekitRayError):
            if self._lost is None and _is_of(self._mine, _look(self._sink)):
                self.sink.delete([LEASE_FILE])
        HELD.discard(self._mine.token)

    def _keep(self) -> None:
        while not self._done.wait(self._mine.term.renew_seconds):
            # A store that fails for a while is asked again; should it go on, the merge fails by it anyway.
            with contextlib.suppress(StorageError):
                self.confirm()
            if self._lost is not None:
                return

    def _renew(self) -> None:
        now = self._clock()
        data = replace(self._mine, renewed=now).to_bytes()
        for _ in range(2):
            version = self._write(data)
            if version is not None:
                self._version, self._confirmed = version, now
                return
            found = _look(self._sink)
            if found is None or not _is_of(self._mine, found):
                break
            self._version = found[1]  # an earlier renewal whose answer was lost
        else:
            return
        by = "somebody has removed the lease" if found is None else f"it was taken over by {found[0] or 'another'}"
        self._lost = StorageError(
            f"this merge no longer holds its output: {by}",
            where=f"{self._sink.uri}/{LEASE_FILE}",
            remedy="nothing was published by this run; let only one merge write there, and run again to resume",
            retryable=False,
        )

    def _write(self, data: bytes) -> str | None:
        """The new version; None if the lease is not as we left it."""
        if isinstance(self._sink, ConditionalSink):
            stat = self._sink.replace(LEASE_FILE, data, version=self._version)
            return None if stat is None else stat.version
        if not _is_of(self._mine, _look(self._sink)):
            return None
        return self._sink.put(LEASE_FILE, data).version


@contextlib.contextmanager
def hold(
    sink: Sink, tell: Reporter, stop: threading.Event, term: Term | None = None, clock: Callable[[], float] = time.time
) -> Iterator[Lease]:
    """Hold the lease of an output during the block.

    Args:
        sink: the output.
        tell: told when a lease that looks expired is watched.
        stop: set by the user's interrupt.
        term: of the lease; None for what suits the store. A lease that cannot be read is assumed to have the same term.
        clock: seconds since 1970, as `time.time`.

    Raises:
        StorageError: another driver holds it; says who, and what to do.
        Interrupted: ``stop`` was set while an expired one was watched.
    """
    if term is None:
        term = LONG_TERM if isinstance(sink, PublishingSink) else Term()
    lease = _acquire(sink, tell, stop, term, clock)
    try:
        yield lease
    finally:
        lease.release()


def discard_dead(sink: Sink) -> None:
    """Remove what a driver that died after it had published all has left; that of one that may be alive stays.

    Failures are ignored: it is in nobody's way.
    """
    with contextlib.suppress(MergekitRayError):
        found = _look(sink)
        if found is not None:
            holder = found[0]
            if holder is None or holder.token in HELD:
                return
            if not holder.has_ended and time.time() - holder.renewed < holder.term.seconds + holder.term.watch_seconds:
                return
            sink.delete([LEASE_FILE])
        if isinstance(sink, RemainsSink):
            sink.discard_remains()


def _acquire(sink: Sink, tell: Reporter, stop: threading.Event, term: Term, clock: Callable[[], float]) -> Lease:
    for _ in range(_MAX_ATTEMPTS):
        mine = Holder.of_this_process(term, clock())
        HELD.add(mine.token)  # before others of this process can see it
        version = None
        try:
            version = _try(sink, mine, tell, stop, clock)
        finally:
            if version is None:
                HELD.discard(mine.token)
        if version is not None:
            return Lease(sink, mine, version, clock)
    raise StorageError(
        "others keep taking the lease", where=f"{sink.uri}/{LEASE_FILE}", remedy="let only one merge write there"
    )


def _try(sink: Sink, mine: Holder, tell: Reporter, stop: threading.Event, clock: Callable[[], float]) -> str | None:
    """The version of the lease, if it is ours now; None if another was faster and it is worth another try.

    Raises:
        StorageError: another driver holds it.
    """
    is_ours = sink.put_if_absent(LEASE_FILE, mine.to_bytes())
    found = _look(sink)
    if not is_ours and found is not None:
        holder, version = found
        if holder is None or not holder.has_ended:
            age = mine.term.seconds if holder is None else clock() - holder.renewed
            _wait_for_end(sink, holder, mine.term if holder is None else holder.term, age, version, tell, stop)
        found = _look(sink) if _take_over(sink, mine, version) else None
    # Read again: whatever the store promises, it is ours if it says so.
    if not _is_of(mine, found):
        return None
    if isinstance(sink, RemainsSink) and sink.discard_remains() is None:
        tell.event(
            "warning",
            "these credentials may not list or abort unfinished uploads, so another merge that has lost this output "
            "could still complete its own",
        )
    # And again: until then another who has lost it might still have removed it.
    found = _look(sink)
    return found[1] if found is not None and _is_of(mine, found) else None


def _is_of(holder: Holder, found: tuple[Holder | None, str] | None) -> bool:
    return found is not None and found[0] is not None and found[0].token == holder.token


def _wait_for_end(
    sink: Sink,
    holder: Holder | None,
    term: Term,
    age: float,
    version: str,
    tell: Reporter,
    stop: threading.Event,
) -> None:
    """Return once a lease is certain to be nobody's any more.

    Args:
        sink: the output.
        holder: of the lease; None if it cannot be read.
        term: of the lease.
        age: seconds since it was renewed.
        version: of the file.
        tell: told that it is watched.
        stop: set by the user's interrupt.

    Raises:
        StorageError: it is somebody's.
        Interrupted: ``stop`` was set.
    """
    if abs(age) < term.seconds:
        raise _held(sink, holder, term, f"by its clock it was renewed {max(0.0, age):.0f} s ago")
    who = "somebody" if holder is None else str(holder)
    tell.event(
        "lease_expired",
        f"the lease of {who} looks expired: watching it for {term.watch_seconds:.0f} s before taking it over",
        watch_seconds=term.watch_seconds,
    )
    deadline = time.monotonic() + term.watch_seconds
    while (left := deadline - time.monotonic()) > 0:
        if stop.is_set():
            raise Interrupted("stopped", remedy=RESUME_CALL)
        time.sleep(min(left, _MAX_POLL_SECONDS, term.watch_seconds / 10))
        stat = sink.stat(LEASE_FILE)
        if stat is None:
            return
        if stat.version != version:
            raise _held(
                sink, holder, term, "it was renewed just now, though by its clock it has expired: see to the clocks"
            )


def _held(sink: Sink, holder: Holder | None, term: Term, sign: str) -> StorageError:
    return StorageError(
        f"another merge writes there: {holder or 'of a kind that cannot be read'}; {sign}",
        where=sink.uri,
        remedy="wait until it ends, stop it, or choose another output. If it is dead, run again "
        f"{term.seconds:.0f} s after its last renewal",
        retryable=False,
    )


def _take_over(sink: Sink, mine: Holder, version: str) -> bool:
    """Replace a dead lease by ours, unless somebody was faster."""
    if isinstance(sink, ConditionalSink):
        return sink.replace(LEASE_FILE, mine.to_bytes(), version=version) is not None
    stat = sink.stat(LEASE_FILE)
    if stat is not None and stat.version != version:
        return False
    sink.put(LEASE_FILE, mine.to_bytes())
    return True


def _look(sink: Sink) -> tuple[Holder | None, str] | None:
    """The present lease, with its version."""
    try:
        data, stat = sink.read_head(LEASE_FILE, MAX_LEASE_BYTES)
    except CheckpointError:
        return None
    return Holder.from_bytes(data), stat.version

"""The fence around an output: a driver that lost its lease, or a worker that was given up, cannot change it.

A process may be stopped at any instruction for longer than its lease lasts, and then go on. Checking first and acting
afterwards is therefore not enough. Each change takes three steps instead:

1. it is *prepared* where no reader sees it: a temporary file, a multipart upload;
2. the lease is read: it must still be ours;
3. it is *committed* by one request that fails if what was prepared is gone: a rename, the upload's completion.

A driver that takes over writes the lease, then discards everything others have prepared, and only then looks at the
output. A change whose second step came earlier was either committed before that look, or fails in its third step.

Each store's `GuardedSink` and docs/reliability.md say how far the store can promise this.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Final

from mergekit_ray.core.errors import CheckpointError, StorageError
from mergekit_ray.storage.opening import open_sink
from mergekit_ray.storage.protocols import GuardedSink, Sink, Source

WORK_FOLDER: Final = ".mergekit-ray"
LEASE_FILE: Final = f"{WORK_FOLDER}/lease.json"

MAX_LEASE_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Fence:
    """Under which lease, and by whom, an output is written to: plain data, which goes to workers.

    Attributes:
        root: URI of the output that the lease is for.
        token: of the lease.
        worker: who writes; empty for the driver.
    """

    root: str
    token: str
    worker: str = ""

    def check(self, source: Source) -> None:
        """Check that the lease is still held, and this worker has not been given up.

        Args:
            source: the output that the lease is for.

        Raises:
            StorageError: another holds it, or nobody does; or the worker has been given up.
        """
        try:
            found = json.loads(source.read(LEASE_FILE, max_bytes=MAX_LEASE_BYTES))
            token, given_up = found.get("token"), found.get("given_up", ())
        except (CheckpointError, ValueError, AttributeError):
            token, given_up = None, ()
        if token != self.token:
            raise StorageError(
                "this merge no longer holds its output",
                where=f"{self.root}/{LEASE_FILE}",
                remedy="let only one merge write there, and run again to resume",
                retryable=False,
            )
        if self.worker and self.worker in given_up:
            raise StorageError("this worker was given up, and its shard given to another", where=self.root)


def allow_all() -> None:
    """The guard of a store that nobody else can be writing to."""


def open_fenced(uri: str, fence: Fence | None) -> Sink:
    """The store at ``uri``, in or below the output that ``fence`` is for; see `open_sink` for the errors.

    Every change asks `Fence.check` where the store is a `GuardedSink`; others are opened as they are.
    """
    return open_sink(uri) if fence is None else guarded(open_sink(uri), fence)


def guarded(sink: Sink, fence: Fence) -> Sink:
    """The same store, in which every change asks `Fence.check`, if it is a `GuardedSink`."""
    if not isinstance(sink, GuardedSink):
        return sink
    root = sink if sink.uri == fence.root else open_sink(fence.root)
    return sink.guarded(lambda: fence.check(root))

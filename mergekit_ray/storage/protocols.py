"""What a store can do.

One class per URI scheme implements these; `open_source` and `open_sink` of `mergekit_ray.storage` pick it.

Names are relative to the store's root (a folder, an S3 prefix, a cached snapshot) and use ``/``. Ranges are end
exclusive.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

WritableBuffer: TypeAlias = memoryview
"""A contiguous, writable memoryview of bytes (format ``B``)."""


@dataclass(frozen=True, slots=True)
class FileStat:
    """A file as a store sees it now.

    Attributes:
        name: relative to the store's root.
        num_bytes: its size.
        version: changes whenever the content does: an ETag, a commit, or size and modification time.
    """

    name: str
    num_bytes: int
    version: str


@runtime_checkable
class Source(Protocol):
    """Somewhere checkpoints are read from. All methods may be called from several threads at once.

    Transient faults are retried inside (range by range, with jittered backoff) and become `StorageError` when they
    outlast the retries. A file that is not there is a `CheckpointError` on reading, None on `stat`.
    """

    @property
    def uri(self) -> str:
        """Where this is, as a user would write it; never holds a credential."""
        ...

    def list(self) -> list[FileStat]:
        """All files below the root, sorted by name. Empty if the root does not exist."""
        ...

    def stat(self, name: str) -> FileStat | None:
        """Size and version of one file, None if there is none of this name."""
        ...

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """A whole small file.

        Raises:
            CheckpointError: it is not there, or larger than ``max_bytes``.
        """
        ...

    def read_head(self, name: str, num_bytes: int) -> tuple[bytes, FileStat]:
        """The first ``num_bytes`` (or all, if the file is shorter) with size and version, in one round trip.

        Raises:
            CheckpointError: it is not there.
        """
        ...

    def read_ranges(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        buffers: Sequence[WritableBuffer],
        *,
        version: str | None = None,
    ) -> int:
        """Read byte ranges straight into the caller's buffers, each exactly as long as its range.

        Ranges that lie close are fetched as one request; requests run concurrently; only what failed is retried.

        Args:
            name: of the file.
            ranges: ``(start, end)`` in bytes.
            buffers: one for each range.
            version: if given, what `FileStat.version` was when the plan was made.

        Returns:
            How many bytes were asked of the store: those of the ranges and of the gaps between them.

        Raises:
            CheckpointError: the file is not there, is shorter than a range, or is no longer at ``version``.
            StorageError: the store failed after retries. The buffers' content is then undefined.
        """
        ...


@dataclass(frozen=True, slots=True)
class MappedRange:
    """Bytes of a file, mapped rather than copied: if the file changes later, so may they.

    Attributes:
        data: read only.
        check: call it after you have used the bytes. If it raises, discard what you made of them: CheckpointError if
            the file has changed, StorageError if a part of it could not be read.
    """

    data: memoryview
    check: Callable[[], None]


@runtime_checkable
class MappableSource(Source, Protocol):
    """A source whose files can be mapped instead of copied into buffers."""

    def map_range(self, name: str, start: int, end: int, *, version: str | None = None) -> MappedRange:
        """Bytes ``[start, end)`` of a file, read in but not copied.

        Raises:
            CheckpointError, StorageError: as `read_ranges`.
        """
        ...


@runtime_checkable
class LinkedSource(Source, Protocol):
    """A source whose files may be links. `read` and the other methods refuse one that leads out of the model."""

    def check_links(self, is_wanted: Callable[[str], bool]) -> None:
        """Check that every link of a wanted name leads to a file of the model: `list` leaves out links to nothing.

        Args:
            is_wanted: whether a file of this name is needed.

        Raises:
            CheckpointError: one leads elsewhere, or nowhere, or is a folder with files that are wanted.
        """
        ...


class Upload(Protocol):
    """One file being written, in order. Nothing is visible under its name before `commit`."""

    def write(self, data: memoryview | bytes) -> None:
        """Append. ``data`` may be reused as soon as this returns."""
        ...

    def commit(self) -> FileStat:
        """Make the file visible, durable and complete.

        Raises:
            StorageError: it could not be stored, or fewer or more bytes than announced were written.
        """
        ...

    def abort(self) -> None:
        """Leave nothing behind. Safe to call twice and after a failed `commit`; a committed file stays."""
        ...


@runtime_checkable
class Sink(Source, Protocol):
    """A source that can be written to."""

    def open(self, name: str, num_bytes: int) -> Upload:
        """Start writing a file of exactly ``num_bytes``. An existing file of that name stays until commit."""
        ...

    def put(self, name: str, data: bytes) -> FileStat:
        """Write a small file atomically, replacing an existing one."""
        ...

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Write a small file atomically unless one exists: of several racers exactly one gets True.

        Where a store cannot promise that, the class says so in its docstring.
        """
        ...

    def delete(self, names: Sequence[str]) -> None:
        """Remove files; those that are not there are ignored. Emptied folders below the root go too."""
        ...


@runtime_checkable
class PublishingSink(Sink, Protocol):
    """A sink whose readers see nothing of what is written before all of it is there."""

    def finish(self) -> None:
        """Show everything that was written, at once, to everybody. Called when nothing more is to be written.

        Raises:
            StorageError: it is not shown. Everything can be written and finished again.
        """
        ...


@runtime_checkable
class ConditionalSink(Sink, Protocol):
    """A sink that can replace a file only if nobody else has."""

    def replace(self, name: str, data: bytes, *, version: str) -> FileStat | None:
        """Write a small file atomically if the present one is at ``version``: of several racers one succeeds.

        Where a store cannot promise that, the class says so in its docstring.

        Returns:
            What was written; None if the file is not there or at another version.
        """
        ...


@runtime_checkable
class MovingSink(Sink, Protocol):
    """A sink that can give files other names without having their content sent again."""

    def move(self, names: Mapping[str, str]) -> None:
        """Move files to new names, replacing what is there. Each is there, whole, under one name or the other or both.

        Args:
            names: new name by old name.

        Raises:
            CheckpointError: a file is not there, or changed meanwhile.
            StorageError: the store failed. Some may have been moved.
        """
        ...


@runtime_checkable
class RemainsSink(Sink, Protocol):
    """A sink where what was begun to be written can be discarded by another than who began it."""

    def discard_remains(self, names: Collection[str] | None = None) -> int | None:
        """Discard what was prepared and not committed, whoever began it. Committing it fails from then on.

        Args:
            names: of the files that it was to become; None for all in the root and in folders named with a dot, but
                for the lease.

        Returns:
            How many; None where these credentials may not.
        """
        ...


@runtime_checkable
class GuardedSink(Sink, Protocol):
    """A sink that can ask whether a change is still to be made, at the moment from which on it can be prevented."""

    def guarded(self, guard: Callable[[], None]) -> Sink:
        """The same store, in which every change calls ``guard`` once it is prepared and before it is committed.

        What ``guard`` raises ends the change; nothing of it is left behind. `put_if_absent` and `replace`, which have
        conditions of their own, do not call it.

        Unless the class says otherwise, a change whose guard was called before `RemainsSink.discard_remains` has either
        been made when that returns, or fails.
        """
        ...

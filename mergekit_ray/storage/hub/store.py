"""Repositories of the Hugging Face Hub that are written to."""

from __future__ import annotations

import builtins
import copy
import threading
from collections.abc import Callable, Sequence

from mergekit_ray.core.errors import CheckpointError, ConfigError
from mergekit_ray.core.sizes import counted
from mergekit_ray.storage.faults import changed, missing
from mergekit_ray.storage.hub.branch import (
    BASE_FILE,
    Head,
    HeadMovedError,
    WorkingBranch,
    content_versions,
    is_note,
)
from mergekit_ray.storage.hub.requests import is_offline
from mergekit_ray.storage.hub.source import parse_reference
from mergekit_ray.storage.hub.upload import HubUpload
from mergekit_ray.storage.names import check_name
from mergekit_ray.storage.protocols import FileStat, WritableBuffer
from mergekit_ray.storage.ranges import sorted_ranges
from mergekit_ray.storage.schemes import SINKS
from mergekit_ray.storage.transfers import RetryPolicy, read_whole


class HubStore:
    """A repository of the Hub, read and written. Readers see nothing before `finish`, and then everything at once.

    What is written goes to a branch, ``mergekit-ray-unfinished``, one commit for each file; `finish` brings ``main`` to
    what that branch holds by one commit (without sending anything again) and removes it. What is read and listed here
    is that branch, or ``main`` if there is none. A repository that does not exist is created, as a private one.

    What a rerun can do: it finds the shards that were committed, with their records, and goes on from there, on any
    machine. What it cannot: a shard whose upload broke off is computed and sent again. `put` commits at once only what
    is in a folder named with a dot; all else is held in memory until `finish`, seen by this object alone, and lost
    with its process. That costs a rerun little: side files are written again when all shards are there.

    As a `GuardedSink` it makes each commit follow one in which the guard was satisfied, and publishes to ``main`` only
    what was in such a commit. The publishing itself can follow only a commit of ``main``: a driver that is stopped
    right before it, and loses its lease, may still publish its model, whole, before the one that took over publishes
    its own in its place. It may then also remove the branch of the other, which ends with an error.

    Each shard is two commits, and the Hub limits the commits to a repository per hour: a merge of very many shards
    waits for it, or ends with an error and is to be run again. `put_if_absent` is a commit that must follow the one in
    which the file was seen not to be there, so of several racers one wins; so does `replace`.

    Args:
        name: of the repository.
        retry: how often and how soon requests are tried again.
    """

    def __init__(self, name: str, *, retry: RetryPolicy | None = None) -> None:
        self._branch = WorkingBranch(name, retry or RetryPolicy())
        self._staged: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._guard: Callable[[], None] | None = None

    def guarded(self, guard: Callable[[], None]) -> HubStore:
        """See `GuardedSink.guarded`. What is held in memory until `finish` is held by both."""
        store = copy.copy(self)
        store._guard = guard  # noqa: SLF001 - of this class
        return store

    @property
    def uri(self) -> str:
        """``hf://org/name``."""
        return f"hf://{self._branch.name}"

    def list(self) -> builtins.list[FileStat]:
        """See `Source.list`."""
        head = self._branch.look()
        found = {name: listed.stat for name, listed in head.files.items()} if head else {}
        found |= {name: _staged_stat(name, data) for name, data in self._staged_files().items()}
        found.pop(BASE_FILE, None)
        return sorted(found.values(), key=lambda file: file.name)

    def stat(self, name: str) -> FileStat | None:
        """See `Source.stat`."""
        check_name(name, self.uri)
        staged = self._staged_files().get(name)
        if staged is not None:
            return _staged_stat(name, staged)
        head = self._branch.look()
        listed = head.files.get(name) if head else None
        return listed.stat if listed else None

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """See `Source.read`."""
        return read_whole(self, name, max_bytes)

    def read_head(self, name: str, num_bytes: int) -> tuple[bytes, FileStat]:
        """See `Source.read_head`."""
        stat, data, head = self._find(name)
        end = min(num_bytes, stat.num_bytes)
        return (data[:end] if head is None else self._branch.read(head, name, 0, end)), stat

    def read_ranges(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        buffers: Sequence[WritableBuffer],
        *,
        version: str | None = None,
    ) -> int:
        """See `Source.read_ranges`. One request for the run of bytes that holds all: what is read here is small."""
        stat, data, head = self._find(name)
        if version is not None and stat.version != version:
            remedy = "let nothing else write to the repository, and start the merge again"
            raise changed(f"{self.uri}/{name}", remedy)
        wanted = sorted_ranges(ranges, buffers)
        if not wanted:
            return 0
        first, last = wanted[0][0], max(end for _, end, _ in wanted)
        if last > stat.num_bytes:
            raise CheckpointError(
                f"has {stat.num_bytes} bytes, but byte {last - 1} is asked for", where=f"{self.uri}/{name}"
            )
        run = data[first:last] if head is None else self._branch.read(head, name, first, last)
        for start, end, buffer in wanted:
            buffer[:] = run[start - first : end - first]
        return last - first

    def open(self, name: str, num_bytes: int) -> HubUpload:
        """See `Sink.open`. Nothing is sent before it is committed."""
        check_name(name, self.uri)
        return HubUpload(self._branch, name, num_bytes, self._unstage, self._guard)

    def put(self, name: str, data: bytes) -> FileStat:
        """See `Sink.put`. Outside of folders named with a dot, others see it after `finish`."""
        check_name(name, self.uri)
        if not is_note(name):
            with self._lock:
                self._staged[name] = bytes(data)
            return _staged_stat(name, data)
        from huggingface_hub import CommitOperationAdd  # noqa: PLC0415

        self._branch.make()
        self._branch.commit_guarded([CommitOperationAdd(name, bytes(data))], f"Note {name}", self._guard)
        return self._branch.stat(name)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """See `Sink.put_if_absent`. Racers must write different data: it tells a lost answer from a lost race."""
        from huggingface_hub import CommitOperationAdd  # noqa: PLC0415

        check_name(name, self.uri)
        self._branch.make()
        while True:
            head = self._branch.look(fresh=True)
            if name in self._staged_files():
                return False
            listed = head.files.get(name) if head else None
            if head is None or listed is not None:
                return listed is not None and listed.stat.version in content_versions(data)
            try:
                operation = CommitOperationAdd(name, bytes(data))
                self._branch.commit([operation], f"Note {name}", parent=head.repository.commit)
            except HeadMovedError:
                continue
            return True

    def replace(self, name: str, data: bytes, *, version: str) -> FileStat | None:
        """See `ConditionalSink.replace`. Racers must write different data, as for `put_if_absent`."""
        from huggingface_hub import CommitOperationAdd  # noqa: PLC0415

        check_name(name, self.uri)
        while True:
            head = self._branch.look(fresh=True)
            listed = head.files.get(name) if head else None
            if head is None or listed is None:
                return None
            if listed.stat.version != version:
                return listed.stat if listed.stat.version in content_versions(data) else None
            try:
                operation = CommitOperationAdd(name, bytes(data))
                self._branch.commit([operation], f"Note {name}", parent=head.repository.commit)
            except HeadMovedError:
                continue
            return self._branch.stat(name)

    def delete(self, names: Sequence[str]) -> None:
        """See `Sink.delete`."""
        from huggingface_hub import CommitOperationDelete  # noqa: PLC0415

        for name in names:
            check_name(name, self.uri)
        self._unstage(*names)
        head = self._branch.look(fresh=True) if names else None
        there = [name for name in names if head and name in head.files]
        if there:
            self._branch.make()
            operations = [CommitOperationDelete(name, is_folder=False) for name in there]
            self._branch.commit_guarded(operations, f"Remove {counted(len(there), 'file')}", self._guard)

    def finish(self) -> None:
        """See `PublishingSink.finish`."""
        staged = self._staged_files()
        if staged:
            self._branch.make()
        self._branch.publish(staged, self._guard)
        with self._lock:
            self._staged.clear()

    def _unstage(self, *names: str) -> None:
        with self._lock:
            for name in names:
                self._staged.pop(name, None)

    def _staged_files(self) -> dict[str, bytes]:
        with self._lock:
            return dict(self._staged)

    def _find(self, name: str) -> tuple[FileStat, bytes, Head | None]:
        """A file, with its content if that is held in memory, else with where it is."""
        check_name(name, self.uri)
        staged = self._staged_files().get(name)
        if staged is not None:
            return _staged_stat(name, staged), staged, None
        head = self._branch.look()
        if head is None or name not in head.files:
            raise missing(f"{self.uri}/{name}")
        return head.files[name].stat, b"", head


def _staged_stat(name: str, data: bytes) -> FileStat:
    return FileStat(name, len(data), content_versions(data)[0])


@SINKS.register("hf")
def open_output(uri: str) -> HubStore:
    """The repository at ``hf://org/name``, to be written. No request is made yet.

    Raises:
        ConfigError: it has a revision or no owner, or HF_HUB_OFFLINE is set.
        ModelError: the name is not one the Hub could have.
    """
    from huggingface_hub.utils import disable_progress_bars  # noqa: PLC0415

    name, revision = parse_reference(uri, None)
    if revision is not None:
        raise ConfigError(
            "a merge is published on the main branch", where=uri, remedy=f"write to hf://{name}, without a revision"
        )
    if "/" not in name:
        raise ConfigError(
            "a repository to write to needs its owner",
            where=uri,
            remedy=f"write to hf://USER/{name} or hf://ORG/{name}",
        )
    if is_offline():
        raise ConfigError(
            "the output is on the Hub, and HF_HUB_OFFLINE is set", where=uri, remedy="unset it, or write to a folder"
        )
    disable_progress_bars()  # the library's own, one for each upload
    return HubStore(name)

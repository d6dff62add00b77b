"""A repository of the Hub that is written to: a branch of its own until all is there, then one commit on ``main``."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from mergekit_ray.core.errors import StorageError
from mergekit_ray.storage.hub.cache import file_version
from mergekit_ray.storage.hub.faults import (
    BackingStoreError,
    CommitConflictError,
    NotOnHubError,
    UploadError,
    status_of,
    with_retries,
)
from mergekit_ray.storage.hub.repository import Listed, RemoteFiles, Repository, look_up, subject_of
from mergekit_ray.storage.hub.requests import ask, is_hub
from mergekit_ray.storage.protocols import FileStat
from mergekit_ray.storage.ranges import Fetch
from mergekit_ray.storage.transfers import RetryPolicy

T = TypeVar("T")

BRANCH: Final = "mergekit-ray-unfinished"
"""Where a merge is until it is published."""

BASE_FILE: Final = ".mergekit-ray-base"
"""On that branch, the commit of ``main`` that it began from."""

_MAIN: Final = "main"
_FRESH_SECONDS: Final = 5.0
_EDITED_BY_PEOPLE: Final = {"README.md", ".gitattributes"}
_MAX_FOLLOWED: Final = 50
"""Commits of others, while one that is to follow a certain one is tried."""

_CONFLICT_STATUS: Final = {409, 412}


class HeadMovedError(Exception):
    """A commit was to follow a certain one, and another had come first."""


@dataclass(frozen=True, slots=True)
class Head:
    """The branch that is seen: the working branch if there is one, else ``main``.

    Attributes:
        repository: at the head of that branch.
        is_working: which it is.
    """

    repository: Repository
    is_working: bool

    @property
    def files(self) -> Mapping[str, Listed]:
        """By name."""
        return self.repository.files or {}


class WorkingBranch:
    """The working branch of a repository. May be used by several threads, and by several processes at once.

    Args:
        name: of the repository.
        policy: how often and how soon requests are tried again.
    """

    def __init__(self, name: str, policy: RetryPolicy) -> None:
        self.name = name
        self._policy = policy
        self._subject = replace(subject_of(name, None), is_written=True)
        self._lock = threading.Lock()
        self._is_made = False
        self._seen: tuple[float, Head | None] | None = None

    def look(self, *, fresh: bool = False) -> Head | None:
        """What is there now, or was some seconds ago unless it must be ``fresh``; None without a repository.

        Commits of this object are always seen.

        Raises:
            ModelError: the repository is not for this login.
        """
        with self._lock:
            if fresh or self._seen is None or time.monotonic() - self._seen[0] > _FRESH_SECONDS:
                self._seen = (time.monotonic(), self._look())
            return self._seen[1]

    def make(self) -> None:
        """Make the repository (a private one) and the branch, unless they are there."""
        if self._is_made:
            return
        from huggingface_hub import CommitOperationAdd  # noqa: PLC0415

        head = self.look(fresh=True)
        if head is None:
            self._call("creating it", lambda api: api.create_repo(self.name, private=True, exist_ok=True))
        if head is None or not head.is_working:
            self._call("creating a branch", lambda api: api.create_branch(self.name, branch=BRANCH, exist_ok=True))
        begun = look_up(self.name, BRANCH, self._policy, is_written=True)
        if BASE_FILE not in (begun.files or {}):
            with contextlib.suppress(HeadMovedError):  # another process has begun it
                operation = CommitOperationAdd(BASE_FILE, begun.commit.encode())
                self.commit([operation], "Begin a merge", parent=begun.commit)
        self._is_made = True

    def commit(
        self, operations: Sequence[Any], message: str, *, parent: str | None = None, branch: str = BRANCH
    ) -> None:
        """One commit. What has been uploaded once is not uploaded again when it is retried.

        Args:
            operations: of huggingface_hub.
            message: of the commit.
            parent: the commit that this must follow; None if it may follow any.
            branch: to commit to.

        Raises:
            HeadMovedError: it would not follow ``parent``.
            StorageError: the Hub failed, or does not take it.
        """

        def send(api: Any) -> None:
            try:
                api.create_commit(self.name, operations, commit_message=message, revision=branch, parent_commit=parent)
            except (RuntimeError, ValueError) as error:
                raise _upload_fault(error, self._subject.uri) from None
            except OSError as error:
                if status_of(error) not in _CONFLICT_STATUS:
                    raise _without_address(error) from None
                if parent is None:
                    raise CommitConflictError("another commit came first") from error
                raise HeadMovedError(parent) from error

        self._call("writing", send)
        with self._lock:
            self._seen = None

    def commit_guarded(self, operations: Sequence[Any], message: str, guard: Callable[[], None] | None) -> None:
        """One commit to this branch, that follows one at which ``guard`` was called; none need be called without one.

        Raises:
            StorageError: see `commit`; or others commit all the time.
        """
        if guard is None:
            self.commit(operations, message)
            return
        for attempt in range(1, _MAX_FOLLOWED + 1):
            head = self.look(fresh=True)
            guard()
            try:
                self.commit(operations, message, parent=None if head is None else head.repository.commit)
            except HeadMovedError:
                time.sleep(self._policy.pause(min(attempt, self._policy.max_attempts)))
            else:
                return
        raise self._never_still()

    def stat(self, file: str) -> FileStat:
        """A file that was just committed.

        Raises:
            StorageError: it is not there.
        """
        found = self._call("looking up", lambda api: api.get_paths_info(self.name, [file], revision=BRANCH))
        if not found:
            raise StorageError("the file is gone after it was written", where=f"hf://{self.name}/{file}")
        content = found[0].blob_id if found[0].lfs is None else found[0].lfs.sha256
        return FileStat(file, found[0].size, file_version(content, found[0].size))

    def read(self, head: Head, name: str, start: int, end: int) -> bytes:
        """Bytes ``[start, end)`` of a file."""
        data = bytearray(end - start)
        if data:
            files = RemoteFiles(head.repository, self._policy)
            files.fetch(name, Fetch(start, end, [(start, memoryview(data))]), None)
        return bytes(data)

    def publish(self, additions: Mapping[str, bytes], guard: Callable[[], None] | None = None) -> None:
        """Bring ``main`` to what the branch holds and ``additions``, in one commit; then remove the branch.

        Files that others have added to ``main`` meanwhile stay, unless they have changed some of ours as well: then it
        was a model that was published there, and it is replaced as a whole.

        Args:
            additions: files, by name.
            guard: called for each head of the branch that is to be published.

        Raises:
            StorageError: the Hub failed. Either ``main`` is as before and the branch is there, or all is published.
                Or ``guard`` raised it.
        """
        for _ in range(self._policy.max_attempts):
            head = self.look(fresh=True)
            if head is None or not head.is_working:
                if guard is not None and not self._holds(head, additions):
                    guard()
                return
            if guard is not None:
                guard()
            main = look_up(self.name, _MAIN, self._policy, is_written=True)
            operations = self._difference(head, main, additions)
            if operations:
                try:
                    self.commit(operations, "Publish a merge", parent=main.commit, branch=_MAIN)
                except HeadMovedError:  # by another, or by an earlier try whose answer was lost
                    continue
            self._remove()
            return
        raise self._never_still()

    def _never_still(self) -> StorageError:
        return StorageError(
            "others commit to the repository all the time",
            where=f"hf://{self.name}",
            remedy="run again when nothing else writes there",
        )

    @staticmethod
    def _holds(head: Head | None, files: Mapping[str, bytes]) -> bool:
        found = {} if head is None else head.files
        return all(name in found and found[name].stat.version in content_versions(files[name]) for name in files)

    def _look(self) -> Head | None:
        try:
            return Head(look_up(self.name, BRANCH, self._policy, is_written=True), is_working=True)
        except NotOnHubError as error:
            if not error.has_repository:
                return None
        try:
            return Head(look_up(self.name, _MAIN, self._policy, is_written=True), is_working=False)
        except NotOnHubError:
            return None

    def _difference(self, head: Head, main: Repository, additions: Mapping[str, bytes]) -> list[Any]:
        """The operations that make the new model of the old one."""
        from huggingface_hub import (  # noqa: PLC0415
            CommitOperationAdd,
            CommitOperationCopy,
            CommitOperationDelete,
        )

        there = {name: listed.stat.version for name, listed in (main.files or {}).items()}
        kept = {name: listed for name, listed in head.files.items() if not is_note(name)}
        base_file = head.files.get(BASE_FILE)
        base = self.read(head, BASE_FILE, 0, base_file.stat.num_bytes).decode() if base_file else main.commit
        before = look_up(self.name, base, self._policy, is_written=True).files or {}
        first = {name: listed.stat.version for name, listed in before.items()}
        ours: dict[str, tuple[str, ...]] = {name: (listed.stat.version,) for name, listed in kept.items()}
        ours |= {name: content_versions(data) for name, data in additions.items()}
        is_replaced = any(
            there[name] not in (first.get(name), *ours[name])
            for name in ours.keys() & there.keys()
            if name not in _EDITED_BY_PEOPLE
        )
        operations: list[Any] = [
            CommitOperationDelete(name, is_folder=False)
            for name in there
            if name not in ours and (name in before or is_replaced)
        ]
        operations += [
            CommitOperationCopy(name, name, src_revision=head.repository.commit)
            for name, listed in kept.items()
            if name not in additions and there.get(name) != listed.stat.version
        ]
        operations += [
            CommitOperationAdd(name, data)
            for name, data in additions.items()
            if there.get(name) not in content_versions(data)
        ]
        return operations

    def _remove(self) -> None:
        def remove(api: Any) -> None:
            try:
                api.delete_branch(self.name, branch=BRANCH)
            except OSError as error:
                if status_of(error) != 404:  # removed by an earlier try whose answer was lost
                    raise

        self._call("removing a branch", remove)
        self._is_made = False
        with self._lock:
            self._seen = None

    def _call(self, doing: str, call: Callable[[Any], T]) -> T:
        return with_retries(self._policy, lambda: ask(call), doing=doing, subject=self._subject)


def is_note(name: str) -> bool:
    """Whether a file is for the merge itself and not for its readers: what is in a folder named with a dot."""
    return name == BASE_FILE or (name.startswith(".") and "/" in name)


def content_versions(data: bytes) -> tuple[str, str]:
    """A file's version if the Hub keeps it in the repository, and if it keeps it in the store behind."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return file_version(blob, len(data)), file_version(hashlib.sha256(data).hexdigest(), len(data))


def _upload_fault(error: Exception, where: str) -> Exception:
    """What huggingface_hub means by an error of an upload."""
    if isinstance(error, ValueError):
        return StorageError(
            f"the Hub refuses it: {error}", where=where, remedy="see what its page says", retryable=False
        )
    cause = error.__cause__
    if isinstance(cause, Exception):
        return _without_address(cause)
    return UploadError(type(error).__name__)


def _without_address(error: Exception) -> Exception:
    """The same error, unless it quotes an address of the store, which is a credential."""
    response = getattr(error, "response", None)
    if response is None or is_hub(str(response.url)):
        return error
    return BackingStoreError(response.status_code)

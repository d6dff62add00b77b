"""One commit of a repository on the Hub: what files there are, where their bytes are, and getting them."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final
from urllib.parse import urlsplit

from mergekit_ray.core.errors import CheckpointError, StorageError
from mergekit_ray.storage.faults import ShortBodyError, changed, missing
from mergekit_ray.storage.hub.cache import file_version
from mergekit_ray.storage.hub.faults import BackingStoreError, Subject, with_retries
from mergekit_ray.storage.hub.requests import API_SECONDS, ask, endpoint, is_hub, stream
from mergekit_ray.storage.protocols import FileStat, WritableBuffer
from mergekit_ray.storage.ranges import Fetch
from mergekit_ray.storage.transfers import RetryPolicy

COMMIT: Final = re.compile(r"[0-9a-f]{40}")

_CONTENT: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_MAX_SIBLINGS: Final = 1000
"""Repositories of more files are listed page by page: the short way is not complete then."""

MAX_SKIPPED_BYTES: Final = 64 << 20
_START_AGAIN: Final = "start the merge again"


@dataclass(frozen=True, slots=True)
class Listed:
    """A file as the Hub lists it.

    Attributes:
        stat: size and version.
        is_large: it is kept in a store behind the Hub, to which requests are redirected.
    """

    stat: FileStat
    is_large: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """Where a file's bytes are. A signed address is a credential: it is not printed."""

    url: str
    stat: FileStat

    def __repr__(self) -> str:
        return f"_Place({urlsplit(self.url).netloc}, {self.stat})"


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at a commit, as the Hub describes it.

    Attributes:
        name: its present one, which a renamed repository is not asked for by.
        commit: 40 hex digits.
        files: by name, or None if they are not known yet.
    """

    name: str
    commit: str
    files: Mapping[str, Listed] | None = None


def subject_of(name: str, revision: str | None, file: str = "") -> Subject:
    """What messages say of a repository."""
    return Subject(name, revision, f"{endpoint()}/{name}", file)


def look_up(name: str, revision: str | None, policy: RetryPolicy, *, is_written: bool = False) -> Repository:
    """Ask the Hub for the commit a revision stands for, and its files.

    Args:
        name: of the repository.
        revision: a branch, tag or commit; None for the main branch.
        policy: how often to try.
        is_written: the repository is to be written to, for messages.

    Raises:
        ModelError: there is no such repository or revision, or it is not for this login.
        StorageError: the Hub cannot be reached or fails.
    """
    subject = replace(subject_of(name, revision), is_written=is_written)

    def attempt() -> Repository:
        info = ask(lambda api: api.model_info(name, revision=revision, files_metadata=True, timeout=API_SECONDS))
        if len(info.siblings or ()) > _MAX_SIBLINGS:
            entries = ask(lambda api: list(api.list_repo_tree(name, revision=info.sha, recursive=True)))
            return Repository(info.id, info.sha, _listed((e.path, e) for e in entries if hasattr(e, "blob_id")))
        return Repository(info.id, info.sha, _listed((e.rfilename, e) for e in info.siblings or ()))

    return with_retries(policy, attempt, doing="looking it up", subject=subject)


def _listed(entries: Iterable[tuple[str, Any]]) -> dict[str, Listed]:
    files = {}
    for name, entry in entries:
        content = entry.blob_id if entry.lfs is None else entry.lfs.sha256
        files[name] = Listed(FileStat(name, entry.size, file_version(content, entry.size)), entry.lfs is not None)
    return files


class RemoteFiles:
    """The files of one commit, over the network.

    A large file's first request asks the Hub where it is; the answer, a signed address that is good for some time, is
    used by all threads until it is refused. No request is made before one is needed, so that many workers may open
    many repositories without reaching the rate limit of the Hub's API.

    Args:
        repository: and its commit.
        policy: how often and how soon requests are tried again.
    """

    def __init__(self, repository: Repository, policy: RetryPolicy) -> None:
        self.repository = repository
        self._policy = policy
        self._files = repository.files
        self._places: dict[str, _Place] = {}
        self._lock = threading.Lock()
        self._name_locks: dict[str, threading.Lock] = {}

    @property
    def uri(self) -> str:
        """``hf://org/name@commit``."""
        return f"hf://{self.repository.name}@{self.repository.commit}"

    def files(self) -> Mapping[str, Listed]:
        """All files, by name. Asked for once."""
        with self._lock:
            if self._files is None:
                self._files = look_up(self.repository.name, self.repository.commit, self._policy).files or {}
            return self._files

    def known(self, name: str) -> FileStat | None:
        """What the list of files says of one, if it was asked for; None if not, or if there is no such file."""
        listed = None if self._files is None else self._files.get(name)
        return None if listed is None else listed.stat

    def stat(self, name: str) -> FileStat:
        """Size and version of a file, from the list or else by a request for this file.

        Raises:
            CheckpointError: there is no such file.
        """
        known = self.known(name)
        return known or self._with_retries(name, "looking up", lambda: self._place(name)).stat

    def fetch(self, name: str, fetch: Fetch, version: str | None) -> None:
        """Carry a request out, going on from where it broke off as often as the policy allows.

        Raises:
            CheckpointError: the file is not there, is shorter, or is not at ``version``.
        """
        doing = f"reading bytes {fetch.start} to {fetch.end}"
        self._with_retries(name, doing, lambda: self._fetch_once(name, fetch, version))

    def _where(self, name: str) -> str:
        return f"{self.uri}/{name}"

    def _with_retries(self, name: str, doing: str, attempt: Any) -> Any:
        subject = subject_of(self.repository.name, self.repository.commit, name)
        return with_retries(self._policy, attempt, doing=doing, subject=subject)

    def _fetch_once(self, name: str, fetch: Fetch, version: str | None) -> None:
        place = self._place(name)
        if version is not None and place.stat.version != version:
            raise changed(self._where(name), _START_AGAIN)
        if fetch.end > place.stat.num_bytes:
            raise CheckpointError(
                f"has {place.stat.num_bytes} bytes, but byte {fetch.end - 1} is asked for",
                where=self._where(name),
                remedy="the file in the repository is cut short: tell its owner",
            )
        with stream(place.url, fetch.position, fetch.end) as response:
            self._check(response, place)
            skipped = fetch.position - self._first_byte(response, place, fetch.position)
            _receive(response.iter_raw(), fetch, skipped)

    def _place(self, name: str) -> _Place:
        """Where a file is. Of many threads that ask, one sends a request."""
        with self._lock:
            name_lock = self._name_locks.setdefault(name, threading.Lock())
        with name_lock:
            place = self._places.get(name)
            if place is None:
                place = self._places[name] = self._locate(name)
        return place

    def _locate(self, name: str) -> _Place:
        from huggingface_hub import hf_hub_url  # noqa: PLC0415

        repository = self.repository
        url = hf_hub_url(repository.name, name, revision=repository.commit, endpoint=endpoint())
        listed = None if self._files is None else self._files.get(name)
        if self._files is not None and listed is None:
            raise missing(self._where(name))
        if listed is not None and not listed.is_large:
            return _Place(url, listed.stat)
        found = ask(lambda api: api.get_hf_file_metadata(url=url, timeout=API_SECONDS))
        if listed is not None:
            return _Place(found.location, listed.stat)
        if found.size is not None and _CONTENT.fullmatch(found.etag or ""):
            return _Place(found.location, FileStat(name, found.size, file_version(found.etag, found.size)))
        # A mirror that keeps the Hub's headers to itself.
        if name not in self.files():
            raise missing(self._where(name))
        return _Place(found.location, self.files()[name].stat)

    def _check(self, response: Any, place: _Place) -> None:
        """Raise what an answer other than bytes means."""
        from huggingface_hub.utils import hf_raise_for_status  # noqa: PLC0415

        if response.status_code in (200, 206):
            return
        if response.status_code == 416:  # the file ends before the range starts
            raise changed(self._where(place.stat.name), _START_AGAIN)
        if is_hub(str(response.url)):
            hf_raise_for_status(response)
        fault = BackingStoreError(response.status_code)
        if fault.stale:
            name = place.stat.name
            with self._lock:  # a new address that another thread has got meanwhile stays
                if self._places.get(name) is place:
                    del self._places[name]
        raise fault

    def _first_byte(self, response: Any, place: _Place, wanted: int) -> int:
        """Which byte of the file an answer begins with: the wanted one, or 0 where a server sends whole files."""
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers.get("content-range", ""))
        if span is not None:
            if int(span[2]) != place.stat.num_bytes:
                raise changed(self._where(place.stat.name), _START_AGAIN)
            if int(span[1]) == wanted:
                return wanted
        elif response.status_code == 200 and wanted <= MAX_SKIPPED_BYTES:
            return 0
        raise StorageError(
            "the server does not answer range requests as the Hub does",
            where=self._where(place.stat.name),
            remedy="check HF_ENDPOINT and the proxy settings, or fetch the model with `hf download` first",
            retryable=False,
        )


def _receive(chunks: Iterator[bytes], fetch: Fetch, num_skipped: int) -> None:
    """Put what arrives where it belongs, advancing ``fetch``.

    Args:
        chunks: of the answer.
        fetch: says where they go.
        num_skipped: bytes that the answer holds before the position of ``fetch``.

    Raises:
        ShortBodyError: the answer ended first.
    """
    body = _Body(chunks)
    body.skip(num_skipped)
    for gap, buffer in fetch.remaining():
        body.skip(gap)
        fetch.position += gap
        view = buffer
        while view:
            count = body.read_into(view)
            fetch.position += count
            view = view[count:]
    body.end()


class _Body:
    """The bytes of an answer, in the order they come."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def skip(self, num_bytes: int) -> None:
        """Drop the next bytes."""
        while num_bytes:
            num_bytes -= len(self._take(num_bytes))

    def read_into(self, view: WritableBuffer) -> int:
        """Copy as many bytes as there are, at least one, and return how many."""
        data = self._take(len(view))
        view[: len(data)] = data
        return len(data)

    def end(self) -> None:
        """See the end of the answer, without which its connection would not be used again."""
        next(self._chunks, None)

    def _take(self, num_bytes: int) -> memoryview:
        while not self._rest:
            try:
                self._rest = memoryview(next(self._chunks))
            except StopIteration:
                raise ShortBodyError("the answer ended early") from None
        data, self._rest = self._rest[:num_bytes], self._rest[num_bytes:]
        return data

"""Repositories of the Hugging Face Hub, read in place."""

from __future__ import annotations

import builtins
import logging
from collections.abc import Sequence
from typing import Final

from mergekit_ray.core.errors import CheckpointError, ModelError, StorageError
from mergekit_ray.storage.hub.cache import HubCache, cached_snapshot
from mergekit_ray.storage.hub.repository import COMMIT, RemoteFiles, Repository, look_up
from mergekit_ray.storage.hub.requests import is_offline
from mergekit_ray.storage.names import check_name
from mergekit_ray.storage.protocols import FileStat, MappedRange, Source, WritableBuffer
from mergekit_ray.storage.ranges import Fetch
from mergekit_ray.storage.schemes import SCHEMES
from mergekit_ray.storage.transfers import RangeReader, RetryPolicy, read_whole

logger = logging.getLogger(__name__)

_LARGE_BYTES: Final = 1 << 20

LOOK_UP: Final = RetryPolicy(max_attempts=5)
"""Of the first request about a repository: without a network, it is better to say so soon."""


class HubSource:
    """One commit of a repository of the Hub, read only: from this machine's cache what is there, the rest by requests.

    Requests go through huggingface_hub: its settings (HF_ENDPOINT, HF_HUB_CACHE, proxies), its token (HF_TOKEN or the
    stored login) and its session. Nothing is added to the cache. A file's version names its content (SHA-256 or git
    blob id), so all nodes agree on it; the commit itself is in the `uri`.

    When the Hub asks to be left alone (429 with Retry-After or RateLimit), all requests of this process wait, once.

    Args:
        repository: and its commit.
        cache: the commit as far as it is in the cache.
        retry: how often and how soon requests are tried again.
    """

    def __init__(
        self, repository: Repository, cache: HubCache | None = None, *, retry: RetryPolicy | None = None
    ) -> None:
        self._remote = RemoteFiles(repository, retry or RetryPolicy())
        self._cache = cache
        self._reader = RangeReader("hub-read")

    @property
    def uri(self) -> str:
        """``hf://org/name@commit``."""
        return self._remote.uri

    def close(self) -> None:
        """End the threads. The source can still be used; it starts new ones."""
        self._reader.close()
        if self._cache is not None:
            self._cache.close()

    def list(self) -> builtins.list[FileStat]:
        """See `Source.list`. Where the Hub cannot be reached, what is in the cache.

        Raises:
            ModelError: there is no such repository or commit, or it is not for this login.
        """
        try:
            files = [file.stat for file in self._remote.files().values()]
        except StorageError as error:
            if self._cache is None or not error.retryable:
                raise
            logger.warning("the Hub cannot be reached; of %s, only what is in the cache is used", self.uri)
            return self._cache.list()
        return sorted(files, key=lambda file: file.name)

    def stat(self, name: str) -> FileStat | None:
        """See `Source.stat`."""
        check_name(name, self.uri)
        cache = self._cached(name)
        if cache is not None:
            return cache.stat(name)
        try:
            return self._remote.stat(name)
        except CheckpointError:
            return None

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """See `Source.read`."""
        return read_whole(self, name, max_bytes)

    def read_head(self, name: str, num_bytes: int) -> tuple[bytes, FileStat]:
        """See `Source.read_head`. One request if the list of files was asked for, else up to two."""
        check_name(name, self.uri)
        cache = self._cached(name)
        if cache is not None:
            return cache.read_head(name, num_bytes)
        stat = self._remote.stat(name)
        data = bytearray(min(num_bytes, stat.num_bytes))
        if data:
            self._remote.fetch(name, Fetch(0, len(data), [(0, memoryview(data))]), stat.version)
        return bytes(data), stat

    def read_ranges(
        self,
        name: str,
        ranges: Sequence[tuple[int, int]],
        buffers: Sequence[WritableBuffer],
        *,
        version: str | None = None,
    ) -> int:
        """See `Source.read_ranges` and `RangeReader`. A request that breaks off goes on where it broke off."""
        check_name(name, self.uri)
        cache = self._cached(name, version)
        if cache is not None:
            return cache.read_ranges(name, ranges, buffers, version=version)
        return self._reader.read(ranges, buffers, lambda fetch: self._remote.fetch(name, fetch, version))

    def _cached(self, name: str, version: str | None = None) -> HubCache | None:
        """The cache, if it holds the file as it is wanted (as it is listed, if a version is not given)."""
        found = None if self._cache is None else self._cache.stat(name)
        if found is None:
            return None
        known = self._remote.known(name)
        wanted = version or (known.version if known is not None else None)
        return self._cache if wanted in (None, found.version) else None


class MappedHubSource(HubSource):
    """A commit with large files in the cache, where they are used without being copied."""

    def map_range(self, name: str, start: int, end: int, *, version: str | None = None) -> MappedRange:
        """See `MappableSource.map_range`. What is not in the cache, as after a download that broke off, is fetched."""
        check_name(name, self.uri)
        cache = self._cached(name, version)
        if cache is not None:
            return cache.map_range(name, start, end, version=version)
        view = memoryview(bytearray(end - start))
        self.read_ranges(name, [(start, end)], [view], version=version)
        return MappedRange(view, check=lambda: None)


@SCHEMES.register("hf")
def open_repository(uri: str, revision: str | None) -> Source:
    """The repository at ``hf://org/name[@revision]``, pinned to the commit it is at now; by default that of ``main``.

    A commit of 40 hex digits is taken as it is, without a request. Where HF_HUB_OFFLINE is set, or the Hub cannot be
    reached, what is in the cache.

    Raises:
        ModelError: there is no such repository or revision, or it is not for this login; without the Hub, it is not in
            the cache.
        StorageError: the Hub cannot be reached or fails, and the revision is not in the cache.
    """
    name, revision = parse_reference(uri, revision)
    if is_offline():
        return _open_cached(name, revision)
    if revision is not None and COMMIT.fullmatch(revision):
        return _open_commit(Repository(name, revision))
    try:
        repository = look_up(name, revision, LOOK_UP)
    except StorageError as error:
        snapshot = cached_snapshot(name, revision)
        if snapshot is None or not error.retryable:
            raise
        found = HubCache(name, snapshot)
        logger.warning("the Hub cannot be reached; %s is used, which is in the cache", found.uri)
        return found
    if repository.name != name:
        logger.warning("hf://%s is now called hf://%s", name, repository.name)
    return _open_commit(repository)


def parse_reference(uri: str, revision: str | None) -> tuple[str, str | None]:
    """Name and revision of ``hf://org/name[@revision]``.

    Raises:
        ModelError: the name is not one the Hub could have, or there are two revisions.
    """
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415 - slow, see `storage.hub.cache`
    from huggingface_hub.utils import validate_repo_id  # noqa: PLC0415

    name, _, at = uri.partition("://")[2].strip("/").partition("@")
    if at and revision is not None and at != revision:
        raise ModelError(f"two revisions: {at!r} and {revision!r}", where=uri, remedy="leave one out")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ModelError(
            "neither a folder nor a valid name on the Hugging Face Hub", where=name, remedy="names look like org/name"
        ) from error
    return name, at or revision


def _open_commit(repository: Repository) -> HubSource:
    snapshot = cached_snapshot(repository.name, repository.commit)
    if snapshot is None:
        return HubSource(repository)
    cache = HubCache(repository.name, snapshot)
    kind = MappedHubSource if cache.holds_large_files(_LARGE_BYTES) else HubSource
    return kind(repository, cache)


def _open_cached(name: str, revision: str | None) -> HubCache:
    snapshot = cached_snapshot(name, revision)
    if snapshot is None:
        download = f"hf download {name}" + (f" --revision {revision}" if revision else "")
        raise ModelError(
            "neither a folder nor in the Hugging Face cache of this machine, and HF_HUB_OFFLINE is set",
            where=f"{name}@{revision}" if revision else name,
            remedy=f"fetch it first: {download}",
        )
    return HubCache(name, snapshot)
